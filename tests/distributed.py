"""Run by test_sketch.py in several processes: what they find together of arrays that none holds whole.

    python distributed.py PORT PROCESSES PROCESS

The last line printed is JSON: digests of a sketch, and the metrics of a report.
"""

import dataclasses
import hashlib
import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxeff
from jaxeff.metrics import sketch


def main(port: int, processes: int, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    assert len(jax.devices()) == processes
    print(f"\n{json.dumps(found_by(jax.devices()))}")


def found_by(devices: list[jax.Device]) -> dict[str, list]:
    mesh = Mesh(np.array(devices), ("devices",))

    def placed(x: np.ndarray, spec: P) -> jax.Array:
        x = x.astype(np.float32)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    draw = np.random.default_rng(0).standard_normal
    params = {"w": placed(draw((16, 8192)), P(None, "devices"))}
    batch = placed(draw((16, 16)), P("devices"))

    @jax.jit
    def analyzed(params, batch):
        return jaxeff.analyze(params, lambda p, x: jax.nn.relu(x @ p["w"]), batch).numbers.metrics

    whole = sketch.count(placed(np.abs(draw((4096, 16))), P("devices")))
    return {
        "sketch": [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(whole)],
        "report": [np.asarray(field).tolist() for field in dataclasses.astuple(analyzed(params, batch))],
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
