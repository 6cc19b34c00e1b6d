"""What sparse training costs in accuracy: the digits network, each way with as many steps, seeds, active weights.

python benchmarks/dynamic.py [--epochs 20] [--seeds 5] [--sparsities 0.9 0.95 0.98]
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
EVERY = 20


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3, weight_decay=1e-2)


def moving(make, sparsity, key, steps):
    return make(adamw(), sparsity, key=key, end=3 * steps // 4, every=EVERY)


# (sparsity, key, steps) -> optimizer. All have the masks' layers by ERK.
OPTIMIZERS = {
    "static random masks": lambda sparsity, key, steps: prune.rigl(
        adamw(), sparsity, key=key, end=0, every=EVERY
    ),
    "sparse evolution": lambda *given: moving(prune.sparse_evolution, *given),
    "RigL": lambda *given: moving(prune.rigl, *given),
    "straight-through, magnitude": lambda sparsity, key, steps: adamw(),
    "gradual, magnitude": lambda sparsity, key, steps: prune.sparsify(
        adamw(), prune.cubic(sparsity, steps // 10, 3 * steps // 4, EVERY), allocation="erk"
    ),
}


def by_magnitude(params, sparsity):
    return prune.masks(prune.scored(params), sparsity, allocation="erk")


def outputs(params, images):
    return MODEL.apply({"params": params}, images)


def trained(name, sparsity, epochs):
    """Function of a key: the test accuracy, and the fraction of the kernels' weights that are 0."""
    through = name.startswith("straight-through")

    @jax.jit
    def run(key):
        initial, order, moves = jax.random.split(key, 3)
        params = MODEL.init(initial, TRAINING.images[:1])["params"]
        optimizer = OPTIMIZERS[name](sparsity, moves, epochs * STEPS) if sparsity else adamw()
        orders = [
            jax.random.permutation(one, len(TRAINING.labels))[: STEPS * BATCH_SIZE]
            for one in jax.random.split(order, epochs)
        ]

        def step(carry, chosen):
            params, state = carry

            def loss(params):
                if through:
                    params = prune.straight_through(params, by_magnitude(params, sparsity))
                found = outputs(params, TRAINING.images[chosen])
                return optax.softmax_cross_entropy_with_integer_labels(found, TRAINING.labels[chosen]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = jnp.concatenate(orders).reshape(-1, BATCH_SIZE)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        if through:
            params = prune.apply(params, by_magnitude(params, sparsity))
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        zeros = sum(jnp.sum(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)
        return jnp.mean(outputs(params, TEST.images).argmax(-1) == TEST.labels), zeros

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _ = parser.add_argument("--epochs", type=int, default=20)
    _ = parser.add_argument("--seeds", type=int, default=5)
    _ = parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    chosen = parser.parse_args()
    print(timing.machine(), f"\n{chosen.epochs * STEPS} steps, {chosen.seeds} seeds", flush=True)
    start = time.perf_counter()
    for name, sparsity in [
        ("dense", 0.0),
        *((name, sparsity) for sparsity in chosen.sparsities for name in OPTIMIZERS),
    ]:
        run = trained(name, sparsity, chosen.epochs)
        found = np.array([run(jax.random.key(seed)) for seed in range(chosen.seeds)], np.float64)
        accuracy = 100 * found[:, 0]
        print(
            f"{sparsity:.2f} {name:28s} {accuracy.mean():.2f} +- {accuracy.std(ddof=1):.2f} %, "
            f"zeros {100 * found[:, 1].mean():.2f} %",
            flush=True,
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
