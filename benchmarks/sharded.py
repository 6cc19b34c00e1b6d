"""A sketch of an array that lies on several devices: what is sent, what it takes, and that it is the same.

    python benchmarks/sharded.py [--devices 8] [--rows 4096] [--repeats 9]

On a CPU the devices are made up of its cores. On GPUs or TPUs pass the number there is.
"""

from __future__ import annotations

import argparse
import os
import re

COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--devices", type=int, default=8)
    _ = parser.add_argument("--rows", type=int, default=4096)
    _ = parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    # Before jax is imported, or it counts the machine as one device.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={chosen.devices}"
    measure(chosen.devices, chosen.rows, chosen.repeats)


def measure(devices: int, rows: int, repeats: int) -> None:
    import jax
    import numpy as np
    import timing
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxeff.metrics.sketch import count

    mesh = jax.make_mesh((devices // 2, 2), ("a", "b"))
    x = np.abs(np.random.default_rng(0).standard_normal((rows, 4096))).astype(np.float32)
    specs = {"one device": None, "rows": P("a"), "columns": P(None, "b"), "both": P("a", "b"), "copies": P()}
    programs, arrays = {}, {}
    print(f"{timing.machine()}\n{devices} devices, {x.size:,} weights\n")
    for name, spec in specs.items():
        where = jax.devices()[0] if spec is None else NamedSharding(mesh, spec)
        arrays[name] = jax.device_put(x, where)
        programs[name] = count.lower(arrays[name]).compile()
    seconds = timing.interleaved(
        {name: lambda name=name: programs[name](arrays[name]) for name in specs}, repeats
    )
    alone = programs["one device"](arrays["one device"])
    print("| lies as | time, one device's over it | scratch a device | collectives | the same bits |")
    print("|---|---|---|---|---|")
    for name, program in programs.items():
        text = program.as_text()
        sent = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
        shown = ", ".join(f"{number} {kind}" for kind, number in sent.items() if number) or "none"
        found = jax.device_get(program(arrays[name]))
        same = all(map(np.array_equal, jax.tree.leaves(jax.device_get(alone)), jax.tree.leaves(found)))
        ratio = timing.spread(timing.ratios(seconds, "one device", name))
        scratch = program.memory_analysis().temp_size_in_bytes / 2**20
        print(f"| {name} | {ratio} | {scratch:.1f} MiB | {shown} | {'yes' if same else 'NO'} |")


if __name__ == "__main__":
    main()
