"""Does advice hold? Coverage of its intervals, and its joint allocation beside uniform, ERK and LAMP.

    python benchmarks/advise.py [--seeds 5] [--tolerance 0.02] [--networks cnn mlp text]
    sh benchmarks/fetch_mnist.sh DIR; python benchmarks/advise.py --networks lenet --mnist DIR

For each network and seed `jaxeff.advise` searches on one part of the test data. Then 200 held-out sets are drawn,
with replacement, from another part, as large as it and half as large, and the share of them is printed whose interval
holds the rise of the loss on all of that part. Beside it: the largest fraction of the weights within the tolerance on
the examples of the search, for the joint allocation and for those that it is compared with, all by the best criterion
of each.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mnist
import numpy as np
import optax
import sensitivity
import timing
from lenet import LeNet300100

import jaxeff
from jaxeff import demo, prune
from jaxeff.advice._interval import rise

RESAMPLES = 200
STARTS = ("uniform", "erk", "lamp", "global", "sensitivity")


class Network(NamedTuple):
    """A trained network; examples to search with, and others to measure on."""

    variables: Any
    apply_fn: Any
    searched: tuple[jax.Array, jax.Array]
    others: tuple[jax.Array, jax.Array]


def halves(data: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
    inputs, targets = data
    at = len(targets) // 2
    return (inputs[:at], targets[:at]), (inputs[at:], targets[at:])


def cnn(seed: int) -> Network:
    state, _ = demo.train(seed=seed)
    return Network({"params": state.params}, state.apply_fn, *halves(demo.split(demo.digits())[1]))


def of_task(task: sensitivity.Task, seed: int) -> Network:
    variables = {"params": sensitivity.trained(task, seed)}
    return Network(variables, task.module.apply, *halves(task.held_out))


def lenet(seed: int, folder: Path) -> Network:
    """LeNet-300-100, five epochs on MNIST."""
    images, labels = flat(mnist.read_digits(folder, "train"))
    module, optimizer = LeNet300100(), optax.adam(1e-3)
    params = module.init(jax.random.key(seed), images[:1])

    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(sensitivity.loss_fn(module.apply(params, inputs), targets))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, order = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(5):
        for rows in order.permutation(len(images))[: len(images) // 128 * 128].reshape(-1, 128):
            params, state = step(params, state, images[rows], labels[rows])
    return Network(params, module.apply, *halves(flat(mnist.read_digits(folder, "t10k"))))


def flat(digits: mnist.Digits) -> tuple[jax.Array, jax.Array]:
    return jnp.reshape(digits.images, (len(digits.images), -1)) / 255, digits.labels


NETWORKS = {
    "cnn": cnn,
    "mlp": lambda seed: of_task(sensitivity.digits(sensitivity.MLP()), seed),
    "text": lambda seed: of_task(sensitivity.text(), seed),
}


def measured(network: Network, tolerance: float, seed: int) -> dict[str, float]:
    inputs, targets = network.searched
    start = time.perf_counter()
    found = jaxeff.advise(
        network.variables, network.apply_fn, inputs, loss_fn=sensitivity.loss_fn, targets=targets,
        held_out=network.others, tolerance=tolerance, seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(f"seed {seed}: {found.headline()}", flush=True)
    figures = {"joint": found.weights.fraction if found.weights else 0.0}
    figures |= {name: found.weights.starts.get(name, 0.0) if found.weights else 0.0 for name in STARTS}
    kept = {"weights": found.masks, "units": found.plan and found.plan.masks(network.variables)}
    for what, masks in kept.items():
        if masks is not None:
            pruned, count = prune.apply(network.variables, masks), len(network.others[1])
            figures[f"coverage of {what}, half as many"] = covered(network, pruned, count // 2)
            figures[f"coverage of {what}, as many"] = covered(network, pruned, count)
    return figures | {"forward passes": found.forwards, "seconds": seconds}


def covered(network: Network, pruned: Any, size: int) -> float:
    """The share of resampled held-out sets whose interval holds the rise on all examples."""
    inputs, targets = network.others

    def losses(variables: Any) -> np.ndarray:
        each = np.asarray(sensitivity.loss_fn(network.apply_fn(variables, inputs), targets), np.float64)
        return each.reshape(len(each), -1).mean(1)

    dense, other = losses(network.variables), losses(pruned)
    true = other.mean() / dense.mean() - 1
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(RESAMPLES):
        drawn = rng.integers(len(dense), size=size)
        found = rise(dense[drawn], other[drawn], relative=True, seed=seed)
        held += found.low <= true <= found.high
    return held / RESAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--tolerance", type=float, default=0.02)
    _ = parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=[*NETWORKS, "lenet"])
    _ = parser.add_argument("--mnist", type=Path, help="folder of the images, for lenet")
    chosen = parser.parse_args()
    networks = NETWORKS | ({"lenet": functools.partial(lenet, folder=chosen.mnist)} if chosen.mnist else {})
    print(timing.machine())
    found: dict[str, list[dict[str, float]]] = {}
    for name in chosen.networks:
        print(f"\n{name}")
        found[name] = [measured(networks[name](seed), chosen.tolerance, seed) for seed in range(chosen.seeds)]
    rows = dict.fromkeys(row for runs in found.values() for run in runs for row in run)
    print(f"\n| tolerance {chosen.tolerance:.0%} | " + " | ".join(found) + " |")
    print("|---|" + "---|" * len(found))
    for row in rows:
        cells = [[run[row] for run in runs if row in run] for runs in found.values()]
        print(f"| {row} | " + " | ".join(map(cell, cells)) + " |")


def cell(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
