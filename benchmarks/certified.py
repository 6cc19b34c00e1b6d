"""How near to their certified bounds the metrics of sketches come, how small these are, and what they cost.

python benchmarks/certified.py [--arrays 2000] [--weights 10000000] [--repeats 9]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxeff import exact
from jaxeff.sketch import refine, sketch, summarize, summarize_array

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import drawn  # noqa: E402

LARGE = 100_003
SIZES = (1, 2, 7, 1000, LARGE, LARGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--arrays", type=int, default=2000)
    _ = parser.add_argument("--weights", type=int, default=10**7)
    _ = parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    print(timing.machine())
    _accuracy(chosen.arrays)
    _cost(chosen.weights, chosen.repeats)


def _accuracy(arrays: int) -> None:
    cases = itertools.islice(
        ((seed, name, size) for seed in itertools.count(100) for name in drawn.DRAWS for size in SIZES),
        arrays,
    )
    kinds = ("one pass", "two passes")
    ratio = {(kind, name): (0.0, "") for kind in kinds for name in drawn.FIELDS}
    bound, exceeded = dict(ratio), 0
    for number, (seed, name, size) in enumerate(cases):
        x = drawn.draw(name, seed + number, size)
        want, counts = drawn.exact(x), sketch(x)
        for kind, fine in zip(kinds, (None, refine(counts, x)), strict=True):
            found, bounds = summarize(counts, fine)
            for field, error in drawn.errors(found, want).items():
                case, certified = (kind, field), float(getattr(bounds, field))
                share = error / certified if certified > 0 else float("inf") * error if error else 0.0
                exceeded += not error <= certified
                ratio[case] = max(ratio[case], (share, name))
                if size == LARGE:
                    bound[case] = max(bound[case], (certified, name))
    print(f"{arrays} arrays of {len(drawn.DRAWS)} kinds, 1 to {LARGE} weights: {exceeded} bounds exceeded")
    print(f"{'':22} {'worst error / bound':>42} {'worst bound of ' + str(LARGE):>54}")
    print(f"{'':22} {''.join(f'{kind:>27}' for kind in kinds * 2)}")
    for field in drawn.FIELDS:
        shown = [table[kind, field] for table in (ratio, bound) for kind in kinds]
        figures = [f"{value:.3g} {name[:16]:>16}" for value, name in shown]
        print(f"{field:22} {''.join(f'{figure:>27}' for figure in figures)}")


def _cost(weights: int, repeats: int) -> None:
    x = jnp.abs(jax.random.normal(jax.random.key(0), (weights,)))
    counts = sketch(x)
    fine = refine(counts, x)
    near = 1 + np.float32(1e-4) * x
    seconds = timing.interleaved(
        {
            "sketch": lambda: sketch(x),
            "summarize a sketch": lambda: summarize(counts),
            "summarize a refined sketch": lambda: summarize(counts, fine),
            "both passes": lambda: summarize_array(x),
            "both passes, nearly constant": lambda: summarize_array(near),
            "exact.summarize": lambda: exact.summarize(x),
        },
        repeats,
    )
    for name, values in seconds.items():
        print(f"{name:30} {timing.spread([value / weights * 1e9 for value in values], ' ns a weight')}")


if __name__ == "__main__":
    main()
