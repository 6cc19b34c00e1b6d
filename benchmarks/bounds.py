"""How near to their bounds the metrics of sketches come, and how small these are, on arrays of every kind.

python benchmarks/bounds.py [--arrays 2000]

Against float64; fails where a bound is exceeded, on a device and on the host.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import jax
import timing

from jaxeff.metrics import sketch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import drawn  # noqa: E402

LARGE = 100_003
SMALLEST_NORMAL = 2.0**-126  # subnormals are coarse: their bounds tell next to nothing
SIZES = (1, 2, 7, 1000, LARGE, LARGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--arrays", type=int, default=2000)
    chosen = parser.parse_args()
    print(timing.machine())
    cases = itertools.islice(
        ((seed, name, size) for seed in itertools.count(100) for name in drawn.DRAWS for size in SIZES),
        chosen.arrays,
    )
    kinds = {"device": sketch.summarize, "host": lambda counts: sketch.on_host(jax.device_get(counts))}
    ratio = {(kind, field): (0.0, "") for kind in kinds for field in drawn.FIELDS}
    bound, exceeded = dict(ratio), 0
    for number, (seed, name, size) in enumerate(cases):
        x = drawn.draw(name, seed + number, size)
        want, counts = drawn.exact(x), sketch.count(x)
        for kind, summarize in kinds.items():
            found, bounds = summarize(counts)
            for field, error in drawn.errors(found, want).items():
                case, most = (kind, field), float(getattr(bounds, field))
                share = error / most if most > 0 else float("inf") if error else 0.0
                if not error <= most:
                    exceeded += 1
                    label = f"{kind}, {name} of {size}, seed {seed + number}"
                    print(f"{label}: {field} is off by {error:.3g}, bound {most:.3g}")
                ratio[case] = max(ratio[case], (share, name))
                if size == LARGE and want["max"] >= SMALLEST_NORMAL:
                    bound[case] = max(bound[case], (most, name))
    arrays = f"{chosen.arrays} arrays of {len(drawn.DRAWS)} kinds, 1 to {LARGE} weights"
    print(f"{arrays}: {exceeded} bounds exceeded")
    columns = [*(f"worst error / bound, {kind}" for kind in kinds), f"worst bound of {LARGE:,}"]
    print(f"\n| | {' | '.join(columns)} |")
    print("|---|" + "---|" * (len(kinds) + 1))
    for field in drawn.FIELDS:
        shown = [ratio[kind, field] for kind in kinds] + [bound["device", field]]
        print(f"| {field} | {' | '.join(f'{value:.3g} ({name})' for value, name in shown)} |")
    sys.exit(int(exceeded > 0))


if __name__ == "__main__":
    main()
