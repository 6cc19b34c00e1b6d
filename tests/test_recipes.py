"""Recipes on the digits and on networks of a few weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from jaxeff import demo, prune

TRAINING, TEST = demo.split(demo.digits())
ORDER = np.random.default_rng(0).permutation(len(TRAINING.labels))[: 11 * 128].reshape(11, 128)
BATCHES = [(TRAINING.images[chosen].reshape(128, -1), TRAINING.labels[chosen]) for chosen in ORDER]
X, LABELS = TEST.images.reshape(360, -1), TEST.labels


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(96)(x)))))


def created(seed=0, optimizer=None):
    model = Network()
    params = model.init(jax.random.key(seed), X[:1])["params"]
    optimizer = optimizer or optax.adamw(3e-3, weight_decay=0.1)
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


def loss_fn(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _step(state, batch):
    loss = lambda params: jnp.mean(loss_fn(state.apply_fn({"params": params}, batch[0]), batch[1]))  # noqa: E731
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


step = jax.jit(_step)


@jax.jit
def evaluate(state):
    return jnp.mean(jnp.argmax(state.apply_fn({"params": state.params}, X), -1) == LABELS)


def kernels(params):
    return [layer["kernel"] for layer in params.values()]


@pytest.fixture(scope="module")
def dense():
    state = created()
    for batch in 20 * BATCHES:
        state = step(state, batch)
    return state


def test_pruned_weights_are_exactly_0_and_counts_exact(dense):
    pruned = prune.iterative(
        dense, step, BATCHES, evaluate, sparsity=0.9, rounds=3, steps=30, max_sparsity=0.99, progress=False
    )
    total = sum(kernel.size for kernel in kernels(dense.params))
    for number, found in enumerate(pruned.rounds, 1):
        assert found.sparsity == round((1 - 0.1 ** (number / 3)) * total) / total
    assert sum(int((kernel == 0).sum()) for kernel in kernels(pruned.state.params)) == round(0.9 * total)
    for kernel, mask in zip(kernels(pruned.state.params), kernels(pruned.masks), strict=True):
        np.testing.assert_array_equal(kernel == 0, ~mask)
    assert pruned.stopped is None
    assert pruned.dense == float(evaluate(dense)) and pruned.rounds[-1].after == float(evaluate(pruned.state))
    assert int(pruned.state.step) == int(dense.step) + 90
