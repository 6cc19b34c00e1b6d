"""Which criterion knows what the digits network can do without: areas under deletion curves, as a table.

    python benchmarks/deletion_curves.py [--seeds 5] [--epochs 10]

Each seed trains its own network. Scores come from 512 training digits, the loss from all 360 test digits.
"""

from __future__ import annotations

import argparse
import statistics

import optax
import timing

from jaxeff import compare_criteria, demo
from jaxeff.importance import CRITERIA

CHOSEN = tuple(name for name in CRITERIA if name != "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--epochs", type=int, default=10)
    chosen = parser.parse_args()
    training, test = demo.split(demo.digits())
    print(timing.machine())
    areas = {(name, scope): [] for name in (*CHOSEN, "at random") for scope in ("global", "layer")}
    for seed in range(chosen.seeds):
        state, _ = demo.train(seed, chosen.epochs)
        print(f"seed {seed}: test accuracy {float(demo.accuracy(state, test)):.3f}")
        for scope in ("global", "layer"):
            compared = compare_criteria(
                state.params,
                state.apply_fn,
                training.images[: demo.ANALYZED],
                targets=training.labels[: demo.ANALYZED],
                loss_fn=optax.softmax_cross_entropy_with_integer_labels,
                criteria=CHOSEN,
                scope=scope,
                held_out=(test.images, test.labels),
                seed=seed,
            )
            for name, area in zip(CHOSEN, compared.area, strict=True):
                areas[name, scope].append(float(area))
            areas["at random", scope].append(float(compared.random_area.mean()))
    print("\n| removed by | all layers in one order | the same fraction of each layer |\n|---|---|---|")
    for name in sorted({name for name, _ in areas}, key=lambda name: statistics.median(areas[name, "layer"])):
        cells = (timing.spread(areas[name, scope]) for scope in ("global", "layer"))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
