"""What sparse training costs in accuracy: the digits network, in as many steps each way.

python benchmarks/dynamic.py [--epochs 20] [--seeds 5] [--sparsities 0.9 0.95 0.98] [--every 20]
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

from jaxeff import prune
from jaxeff.demo import BATCH_SIZE, DigitsCNN, digits, split

MODEL = DigitsCNN()
TRAINING, TEST = split(digits())
STEPS = len(TRAINING.labels) // BATCH_SIZE


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3, weight_decay=1e-2)


def moving(make, sparsity, key, steps, every):
    return make(adamw(), sparsity, key=key, end=3 * steps // 4, every=every)


# (sparsity, key, steps, steps between changes of the masks) -> optimizer. All have the masks' layers by ERK.
OPTIMIZERS = {
    "static random masks": lambda sparsity, key, steps, every: prune.rigl(
        adamw(), sparsity, key=key, end=0, every=every
    ),
    "sparse evolution": lambda *given: moving(prune.sparse_evolution, *given),
    "RigL": lambda *given: moving(prune.rigl, *given),
    "straight-through, magnitude": lambda sparsity, key, steps, every: adamw(),
    "gradual, magnitude": lambda sparsity, key, steps, every: prune.sparsify(
        adamw(), prune.cubic(sparsity, steps // 10, 3 * steps // 4, every), allocation="erk"
    ),
}


def by_magnitude(params, sparsity):
    return prune.masks(prune.scored(params), sparsity, allocation="erk")


def outputs(params, images):
    return MODEL.apply({"params": params}, images)


def trained(name, sparsity, epochs, every):
    """Function of a seed: the test accuracy, and the fraction of the kernels' weights that are 0."""
    through = name.startswith("straight-through")

    def optimizer(key):
        return OPTIMIZERS[name](sparsity, key, epochs * STEPS, every) if sparsity else adamw()

    def loss(params, chosen):
        if through:
            params = prune.straight_through(params, by_magnitude(params, sparsity))
        found = outputs(params, TRAINING.images[chosen])
        return optax.softmax_cross_entropy_with_integer_labels(found, TRAINING.labels[chosen]).mean()

    @jax.jit
    def step(params, state, key, chosen):
        updates, state = optimizer(key).update(jax.grad(loss)(params, chosen), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def result(params):
        if through:
            params = prune.apply(params, by_magnitude(params, sparsity))
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        zeros = sum(jnp.sum(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)
        return jnp.mean(outputs(params, TEST.images).argmax(-1) == TEST.labels), zeros

    def run(seed):
        initial, key = jax.random.split(jax.random.key(seed))
        params = MODEL.init(initial, TRAINING.images[:1])["params"]
        state = optimizer(key).init(params)
        draw = np.random.default_rng(seed)
        # Not a scan: on a CPU, XLA runs convolutions inside loops several times slower.
        for _ in range(epochs):
            order = draw.permutation(len(TRAINING.labels))[: STEPS * BATCH_SIZE]
            for chosen in order.reshape(STEPS, BATCH_SIZE):
                params, state = step(params, state, key, chosen)
        return result(params)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--epochs", type=int, default=20)
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    _ = parser.add_argument("--every", type=int, default=20)
    _ = parser.add_argument("--ways", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    chosen = parser.parse_args()
    print(timing.machine(), f"\n{chosen.epochs * STEPS} steps, {chosen.seeds} seeds", flush=True)
    start = time.perf_counter()
    for name, sparsity in [
        ("dense", 0.0),
        *((name, sparsity) for sparsity in chosen.sparsities for name in chosen.ways),
    ]:
        run = trained(name, sparsity, chosen.epochs, chosen.every)
        found = np.array([run(seed) for seed in range(chosen.seeds)], np.float64)
        accuracy = 100 * found[:, 0]
        print(
            f"{sparsity:.2f} {name:28s} {accuracy.mean():.2f} +- {accuracy.std(ddof=1):.2f} %, "
            f"zeros {100 * found[:, 1].mean():.2f} %",
            flush=True,
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
