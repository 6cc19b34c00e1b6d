"""The recipes of `jaxeff.prune` on the demo's digits: accuracy by sparsity, mean over seeds.

    python benchmarks/recipes.py [seeds]

A network of 64, 160 and 10 units is trained for 220 steps of AdamW; every recipe then has 440 more, but for
`lottery_ticket`, which starts from the untrained network in each of four rounds. Then the strength of the
entropy penalty, for two optimizers: 330 steps with it from the untrained network, one pruning, 110 steps.
"""

import sys
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from jaxeff import demo, prune

SPARSITIES = (0.9, 0.95, 0.98)
TRAINING, TEST = demo.split(demo.digits())
ORDER = np.random.default_rng(0).permutation(len(TRAINING.labels))[: 11 * 128].reshape(11, 128)
BATCHES = [(TRAINING.images[chosen].reshape(128, -1), TRAINING.labels[chosen]) for chosen in ORDER]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(160)(x)))


MODEL = Network()
OPTIMIZER = optax.adamw(3e-3, weight_decay=1e-2)


def loss_fn(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@jax.jit
def step(state, batch):
    def loss(params):
        return jnp.mean(loss_fn(state.apply_fn({"params": params}, batch[0]), batch[1]))

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@jax.jit
def evaluate(state):
    logits = state.apply_fn({"params": state.params}, TEST.images.reshape(len(TEST.labels), -1))
    return jnp.mean(jnp.argmax(logits, -1) == TEST.labels)


def created(seed, optimizer=OPTIMIZER):
    params = MODEL.init(jax.random.key(seed), BATCHES[0][0])["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=optimizer)


def trained(seed):
    state = created(seed)
    for batch in 20 * BATCHES:
        state = step(state, batch)
    return state


def at_random(state):
    key = jax.random.key(0)
    return jax.tree.map(
        lambda w: jax.random.uniform(key, w.shape) if w.ndim > 1 else jnp.zeros(()), state.params
    )


ROUNDS = {"rounds": 4, "steps": 110}
CALIBRATED = {"loss_fn": loss_fn, "calibration": BATCHES, **ROUNDS}
RECIPES = {
    "iterative_taylor": partial(prune.iterative_taylor, **CALIBRATED),
    "iterative_obd": partial(prune.iterative_obd, **CALIBRATED),
    "iterative_magnitude": partial(prune.iterative_magnitude, **ROUNDS),
    "the same, one round": partial(prune.iterative_magnitude, rounds=1, steps=440),
    "gradual": partial(prune.gradual, steps=330, fine_tune=110, every=22),
    "entropy_regularized": partial(
        prune.entropy_regularized, strength=3.0, steps=220, fine_tune=55, rounds=4
    ),
    "lottery_ticket": partial(prune.lottery_ticket, rounds=4, steps=220),
    "the same, rewind=22": partial(prune.lottery_ticket, rounds=4, steps=220, rewind=22),
    "at random": partial(prune.iterative, importance=at_random, **ROUNDS),
}


def spread(scores):
    return f"{np.mean(scores):.3f} ({np.min(scores):.3f} to {np.max(scores):.3f})"


def recipes(seeds):
    states = [trained(seed) for seed in range(seeds)]
    print(f"dense: {np.mean([float(evaluate(state)) for state in states]):.3f}, {seeds} seeds")
    for name, recipe in RECIPES.items():
        cells = []
        for sparsity in SPARSITIES:
            scores = []
            for seed, state in enumerate(states):
                start = created(seed) if "rewind" in recipe.keywords or "lottery" in name else state
                found = recipe(start, step, BATCHES, evaluate, sparsity=sparsity, progress=False)
                scores.append(found.rounds[-1].after)
            cells.append(spread(scores))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


OPTIMIZERS = {"adamw": OPTIMIZER, "sgd, momentum": optax.sgd(0.1, momentum=0.9)}


def penalties(seeds):
    last = {"sparsity": 0.95, "rounds": 1, "progress": False}
    for name, optimizer in OPTIMIZERS.items():
        for strength in (0.0, 0.3, 1.0, 3.0):
            penalized = partial(
                prune.entropy_regularized, strength=strength, steps=330, fine_tune=110, **last
            )
            found = [penalized(created(seed, optimizer), step, BATCHES, evaluate) for seed in range(seeds)]
            dense = spread([one.dense for one in found])
            print(
                f"| {name} | {strength:g} | {dense} | {spread([one.rounds[-1].after for one in found])} |",
                flush=True,
            )
    within = optax.chain(prune.add_entropy_gradient(1.0), OPTIMIZER)
    found = []
    for seed in range(seeds):
        state = created(seed, within)
        for number in range(330):
            state = step(state, BATCHES[number % len(BATCHES)])
        state = created(seed).replace(params=state.params)
        found.append(prune.iterative_magnitude(state, step, BATCHES, evaluate, steps=110, **last))
    dense = spread([one.dense for one in found])
    print(f"| within adamw | 1 | {dense} | {spread([one.rounds[-1].after for one in found])} |")


if __name__ == "__main__":
    # Taylor and OBD say each round whether their batches were enough.
    warnings.simplefilter("ignore")
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    recipes(seeds)
    penalties(seeds)
