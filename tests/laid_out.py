"""Run by test_cost.py in a process with eight devices: what each of them holds and does."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeff import cost


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"])


def main() -> None:
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    w = jax.device_put(jnp.ones((16, 6)), NamedSharding(mesh, P(None, "model")))
    x = jax.device_put(jnp.ones((32, 16)), NamedSharding(mesh, P("data")))
    params, macs = {"w": w}, 32 * 16 * 6
    found = cost.count(params, apply_fn, x)
    assert (found.devices, found.macs, found.per_device) == (8, macs, None)
    compiled = cost.compiled(apply_fn, params, x)
    assert compiled.devices == 8
    assert 2 * macs / 8 <= compiled.flops < 2.2 * macs / 8
    assert compiled.argument_bytes == 4 * (16 * 6 // 2 + 32 * 16 // 4)
    memory = cost.memory(params, apply_fn, x)
    assert memory.parameter_bytes == 4 * 16 * 6
    assert memory.parameter_bytes_per_device == 4 * 16 * 3
    timed = cost.latency(apply_fn, params, x, repeats=3)
    assert timed.compiled.devices == 8 and timed.cost.macs == macs
    assert timed.bytes_moved == 8 * (compiled.argument_bytes + compiled.output_bytes)


if __name__ == "__main__":
    main()
