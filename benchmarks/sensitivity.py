"""Does the report know which layers can be pruned? Rank correlations of its numbers with the measured loss.

    python benchmarks/sensitivity.py [--seeds 5]

Three networks of many layers, several seeds each. The report (criterion 'activation') reads training
examples; the loss is that of held-out ones, with one layer at a time pruned by magnitude. For each network
Spearman's correlation over its layers: the median over seeds, and the range. 1: what is high in the report
costs. By chance alone, over n layers, it has a standard deviation of 1 / sqrt(n - 1). Then the loss with all
layers pruned, spread over them by what was measured (on the same held-out examples) and by other rules.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from transformer import Transformer

import jaxeff
from jaxeff import demo, prune

ALONE = (0.8, 0.9)
TOGETHER = (0.5, 0.7)
CONTEXT = 64

ALLOCATIONS = {
    "uniform": {},
    "erk": {"allocation": "erk"},
    "global": {"scope": "global"},
    "lamp": {"scope": "global", "allocation": "lamp"},
}

METRICS = {
    "size": lambda row: row.size,
    "utilization": lambda row: row.metrics.utilization,
    "utilization - null": lambda row: row.metrics.utilization - row.null.utilization,
    "redundancy": lambda row: row.metrics.redundancy,
    "gini": lambda row: row.metrics.gini,
    "coverage_90": lambda row: row.metrics.coverage_90,
    "relative_sparsity_1e2": lambda row: row.metrics.relative_sparsity_1e2,
    "effective_units / units": lambda row: row.effective_units / row.unit_count,
    "effective_fan_in / fan-in": lambda row: row.effective_fan_in * row.unit_count / row.size,
    "mean importance": lambda row: row.metrics.mean,
}


class Task(NamedTuple):
    """A network and what it is trained on: (inputs, targets) to train, and held out."""

    module: nn.Module
    training: tuple[jax.Array, jax.Array]
    held_out: tuple[jax.Array, jax.Array]
    steps: int
    batch_size: int
    learning_rate: float


class MLP(nn.Module):
    """Ten dense layers of several widths."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        for width in (256, 64, 192, 128, 32, 256, 96, 48, 160):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Six convolutions and three dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for features, stride in ((16, 1), (24, 2), (16, 1), (32, 1), (48, 2), (24, 1)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
        x = x.reshape(x.shape[0], -1)
        for width in (192, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def digits(module: nn.Module) -> Task:
    return Task(module, *demo.split(demo.digits()), steps=600, batch_size=64, learning_rate=1e-3)


def text() -> Task:
    """The next character of Python's own help texts; the last tenth is held out."""
    characters = np.frombuffer(
        "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace"), np.uint8
    )
    _, codes = np.unique(characters, return_inverse=True)
    rows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1).astype(np.int32)
    pairs = jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])
    at = len(rows) * 9 // 10
    module = Transformer(layers=3, width=64, heads=4, vocabulary=int(codes.max()) + 1, context=CONTEXT)
    training, held_out = (tuple(part[rows] for part in pairs) for rows in (slice(at), slice(at, at + 128)))
    return Task(module, training, held_out, steps=600, batch_size=32, learning_rate=2e-3)


def loss_fn(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def trained(task: Task, seed: int):
    initial, order = jax.random.split(jax.random.key(seed))
    inputs, targets = task.training
    params = task.module.init(initial, inputs[:1])["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(task.learning_rate, task.steps), weight_decay=1e-2)

    @jax.jit
    def step(params, state, key):
        chosen = jax.random.randint(key, (task.batch_size,), 0, len(targets))

        def loss(params):
            outputs = task.module.apply({"params": params}, inputs[chosen])
            return jnp.mean(loss_fn(outputs, targets[chosen]))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    # A loop in Python: XLA's CPU runs convolutions inside its own loops on one core.
    for key in jax.random.split(order, task.steps):
        params, state = step(params, state, key)
    return jax.block_until_ready(params)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Over layers; equal values by their mean rank. nan where one is the same for all."""
    ranks = [np.array([np.mean(x < v) + np.mean(x <= v) for v in x]) for x in (first, second)]
    if min(map(np.ptp, ranks)) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


Figures = dict[tuple[str, float], float]


def figures(task: Task, seed: int) -> tuple[Figures, Figures]:
    """Of one trained network: a correlation for each metric and sparsity, a loss for each allocation."""
    variables = {"params": trained(task, seed)}
    start = time.perf_counter()
    batch, targets = task.held_out
    measured = prune.sensitivity(variables, task.module.apply, batch, targets=targets, loss_fn=loss_fn)
    _ = jax.block_until_ready(measured)
    seconds = time.perf_counter() - start
    report = jaxeff.analyze(variables, task.module.apply, task.training[0][:512])
    rows = [report[path] for path in measured.paths]
    rises = np.asarray(measured.losses) - float(measured.dense)
    rises = {sparsity: rises[:, measured.sparsities.index(sparsity)] for sparsity in ALONE}
    print(
        f"seed {seed}: {len(rows)} layers, held-out loss {float(measured.dense):.3f}; one layer at 80 %: "
        f"{timing.spread([*map(float, rises[0.8])])} more; measured in {seconds:.1f} s"
    )
    found = {
        (name, sparsity): spearman(np.array([float(metric(row)) for row in rows]), rises[sparsity])
        for name, metric in METRICS.items()
        for sparsity in ALONE
    }
    return found, allocated(task, variables, measured)


def allocated(task: Task, variables, measured: prune.Sensitivity) -> Figures:
    """The loss with all layers pruned, for each allocation and sparsity."""
    inputs, targets = task.held_out
    importance = prune.scored(variables)
    loss = jax.jit(lambda pruned: jnp.mean(loss_fn(task.module.apply(pruned, inputs), targets)))
    return {
        (name, sparsity): float(loss(prune.apply(variables, prune.masks(importance, sparsity, **how))))
        for name, how in {**ALLOCATIONS, "measured": {"allocation": measured}}.items()
        for sparsity in TOGETHER
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    print(timing.machine())
    tasks = {"MLP": digits(MLP()), "CNN": digits(CNN()), "transformer": text()}
    found: dict[str, list[tuple[Figures, Figures]]] = {}
    for name, task in tasks.items():
        print(f"\n{name}")
        found[name] = [figures(task, seed) for seed in range(chosen.seeds)]
    print_table({name: [both[0] for both in each] for name, each in found.items()}, "+.2f")
    print_table({name: [both[1] for both in each] for name, each in found.items()}, ".3g")


def print_table(found: dict[str, list[Figures]], form: str) -> None:
    """A row for each name, a column for each task and sparsity: median and range over seeds."""
    first = next(iter(found.values()))[0]
    names, sparsities = (dict.fromkeys(part) for part in zip(*first, strict=True))
    columns = [(task, sparsity) for task in found for sparsity in sparsities]
    print("\n| | " + " | ".join(f"{task}, {sparsity:.0%}" for task, sparsity in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in names:
        cells = [[one[name, sparsity] for one in found[task]] for task, sparsity in columns]
        print(f"| {name} | {' | '.join(_cell(values, form) for values in cells)} |")


def _cell(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
