"""Does advice hold? Coverage of its intervals, and its joint allocation beside uniform, ERK and LAMP.

    python benchmarks/advise.py [--seeds 5] [--tolerance 0.02] [--networks cnn mlp text]
    sh benchmarks/fetch_mnist.sh DIR; python benchmarks/advise.py --networks lenet --mnist DIR
    python benchmarks/advise.py --networks minilm --minilm DIR --text FILE [--text FILE] [--tolerance 0.01]

For each network and seed `jaxeff.advise` searches on one part of the test data. Then 200 held-out sets are drawn,
with replacement, from another part, as large as it and half as large, and the share of them is printed whose interval
holds the rise of the loss on all of that part. Beside it: the largest fraction of the weights within the tolerance on
the examples of the search, for the joint allocation and for those that it is compared with, all by the best criterion
of each.

MiniLM's folder is that of `minilm.py`. Its score, which `evaluate` returns, is the cosine of each sentence's embedding
with that by the dense network; the tolerance is absolute, and a quarter of the sentences is held out of the search.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
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
    """A trained network; examples to search with, and others to measure on.

    Attributes:
        score: (outputs, targets) -> [examples], the higher the better, in place of the loss.
    """

    variables: Any
    apply_fn: Any
    searched: tuple[Any, jax.Array]
    others: tuple[Any, jax.Array]
    score: Callable[[Any, jax.Array], jax.Array] | None = None

    def losses(self, variables: Any, examples: tuple[Any, jax.Array]) -> np.ndarray:
        """[examples], the loss of each, or minus its score."""
        inputs, targets = examples
        outputs = self.apply_fn(variables, *(inputs if isinstance(inputs, tuple) else (inputs,)))
        each = sensitivity.loss_fn(outputs, targets) if self.score is None else -self.score(outputs, targets)
        each = np.asarray(each, np.float64)
        return each.reshape(len(each), -1).mean(1)

    def advice(self, tolerance: float, seed: int) -> jaxeff.advice.Advice:
        inputs, targets = self.searched
        how = (
            {"loss_fn": sensitivity.loss_fn, "targets": targets, "held_out": self.others}
            if self.score is None
            else {"evaluate": lambda params, _: -self.losses(params, self.searched)}
        )
        return jaxeff.advise(self.variables, self.apply_fn, inputs, **how, tolerance=tolerance, seed=seed)


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


def sentences(seed: int, folder: Path, texts: list[Path]) -> Network:
    """MiniLM with sentences of some texts: 64 to search with and 128 others."""
    import minilm

    params, apply_fn = minilm.params_of(folder), jax.jit(minilm.embed)
    found = minilm.sentences_of(texts)
    order = np.random.default_rng(seed).permutation(len(found))

    def some(rows: np.ndarray) -> tuple[Any, jax.Array]:
        inputs = minilm.tokenized(folder, [found[i] for i in rows])
        return inputs, apply_fn(params, *inputs)

    def cosine(embeddings: jax.Array, dense: jax.Array) -> jax.Array:
        return jnp.sum(embeddings * dense, axis=1)

    return Network(params, apply_fn, some(order[:64]), some(order[64:192]), cosine)


def flat(digits: mnist.Digits) -> tuple[jax.Array, jax.Array]:
    return jnp.reshape(digits.images, (len(digits.images), -1)) / 255, digits.labels


NETWORKS = {
    "cnn": cnn,
    "mlp": lambda seed: of_task(sensitivity.digits(sensitivity.MLP()), seed),
    "text": lambda seed: of_task(sensitivity.text(), seed),
}


def measured(network: Network, tolerance: float, seed: int) -> dict[str, float]:
    start = time.perf_counter()
    found = network.advice(tolerance, seed)
    seconds = time.perf_counter() - start
    print(f"seed {seed}: {found.headline()}", flush=True)
    figures = {"joint": found.weights.fraction if found.weights else 0.0}
    figures |= {name: found.weights.starts.get(name, 0.0) if found.weights else 0.0 for name in STARTS}
    kept = {"weights": found.masks, "units": found.plan and found.plan.masks(network.variables)}
    for what, masks in kept.items():
        if masks is not None:
            pruned = prune.apply(network.variables, masks)
            losses = [network.losses(variables, network.others) for variables in (network.variables, pruned)]
            own = functools.partial(rise, relative=network.score is None)
            figures[f"rise without {what}"] = own(*losses, seed=0).mean
            count = len(losses[0])
            figures[f"coverage of {what}, half as many"] = covered(own, *losses, count // 2)
            figures[f"coverage of {what}, as many"] = covered(own, *losses, count)
    return figures | {"forward passes": found.forwards, "seconds": seconds}


def covered(
    rise: Callable[..., jaxeff.advice.Rise], dense: np.ndarray, other: np.ndarray, size: int
) -> float:
    """The share of resampled held-out sets whose interval holds the rise on all examples."""
    true = rise(dense, other, seed=0).mean
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(RESAMPLES):
        drawn = rng.integers(len(dense), size=size)
        found = rise(dense[drawn], other[drawn], seed=seed)
        held += found.low <= true <= found.high
    return held / RESAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--tolerance", type=float, default=0.02)
    _ = parser.add_argument(
        "--networks", nargs="+", default=[*NETWORKS], choices=[*NETWORKS, "lenet", "minilm"]
    )
    _ = parser.add_argument("--mnist", type=Path, help="folder of the images, for lenet")
    _ = parser.add_argument("--minilm", type=Path, help="folder of the model, for minilm")
    _ = parser.add_argument("--text", type=Path, action="append", help="a file, for minilm; again for more")
    chosen = parser.parse_args()
    networks = NETWORKS | {
        "lenet": functools.partial(lenet, folder=chosen.mnist),
        "minilm": functools.partial(sentences, folder=chosen.minilm, texts=chosen.text),
    }
    print(timing.machine())
    found: dict[str, list[dict[str, float]]] = {}
    for name in chosen.networks:
        print(f"\n{name}")
        found[name] = [measured(networks[name](seed), chosen.tolerance, seed) for seed in range(chosen.seeds)]
    rows = dict.fromkeys(row for runs in found.values() for run in runs for row in run)
    print(f"\n| tolerance {chosen.tolerance} | " + " | ".join(found) + " |")
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
