"""What lives beside a train state is saved with it, by Flax's msgpack."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from network import normal

import jaxeff
from jaxeff import prune, sketch

X, TARGETS = normal(8, 6), normal(8, 3)
PARAMS = {"a": normal(6, 8), "b/c": {"value": normal(8, 3)}}
OPTIMIZER = prune.sparsify(optax.adam(0.1), prune.one_shot(0.5))


def _apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b/c"]["value"]


def _loss(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets), axis=1)


def _analyzed(params, **options):
    return jaxeff.analyze(params, _apply, X, loss_fn=_loss, targets=TARGETS, **options)


# What jaxeff makes of params: saved of some, and restored where there is one of others.
KINDS = {
    "monitor": lambda params: jaxeff.monitor(every=2).init(params, _apply, X),
    "report": lambda params: _analyzed(params, criterion="taylor", curves=True),
    "statistics": lambda params: jaxeff.collect(
        params, _apply, X, criterion=("fisher", "lrp"), loss_fn=_loss, targets=TARGETS
    ),
    "metrics": lambda params: jaxeff.metrics.summarize(jnp.abs(params["a"])),
    "sketch": lambda params: sketch.count(jnp.abs(params["a"])),
    "sensitivity": lambda params: prune.sensitivity(params, _apply, X, targets=TARGETS, loss_fn=_loss),
    "comparison": lambda params: jaxeff.compare_criteria(
        params, _apply, X, targets=TARGETS, loss_fn=_loss, criteria=("magnitude",)
    ),
    "sparsify": OPTIMIZER.init,
    "rigl": prune.rigl(optax.adam(0.1), 0.5, key=jax.random.key(0), end=4, every=1).init,
    "entropy": prune.add_entropy_gradient(0.1).init,
    "masks": lambda params: prune.masks(prune.scored(params), 0.5),
    "packed masks": lambda params: prune.pack(prune.masks(prune.scored(params), 0.5)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_saved_comes_back(make):
    saved, target = make(PARAMS), make(jax.tree.map(lambda leaf: jnp.flip(leaf) + 1, PARAMS))
    restored = flax.serialization.from_bytes({"it": target}, flax.serialization.to_bytes({"it": saved}))["it"]
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)


def test_training_goes_on_from_a_saved_monitor():
    watch = jaxeff.monitor(every=2)
    step = jax.jit(lambda state, params: watch.update(state, params, _apply, X))
    start = watch.init(PARAMS, _apply, X)
    state = step(start, jax.tree.map(jnp.square, PARAMS))
    restored = flax.serialization.from_bytes(start, flax.serialization.to_bytes(state))
    for found, expected in zip(
        *(jax.tree.leaves(step(one, PARAMS)) for one in (restored, state)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["monitor", "report", "statistics"])
def test_a_target_of_another_model_is_refused(name):
    saved = flax.serialization.to_bytes(KINDS[name](PARAMS))
    make = {
        "monitor": lambda: jaxeff.monitor(every=2).init({"w": normal(6, 3)}, _one, X),
        "report": lambda: jaxeff.analyze({"w": normal(6, 3)}, _one, X),
        "statistics": lambda: jaxeff.collect({"w": normal(6, 3)}, _one, X),
    }
    with pytest.raises(ValueError, match="and the target differ"):
        _ = flax.serialization.from_bytes(make[name](), saved)


def _one(params, x):
    return x @ params["w"]
