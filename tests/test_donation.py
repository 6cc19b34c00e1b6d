"""What jaxeff returns is the caller's to give away: a step may donate it, and nothing else is lost."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import normal

import jaxeff
from jaxeff import importance, prune, sketch


class Net(nn.Module):
    """BatchNorm, an attention, and a Dense that is wider than it need be."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(not self.train, name="norm")(nn.Dense(8, name="wide")(x)))
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(3, name="head")(x)


class State(NamedTuple):
    params: Any
    opt_state: Any


NET = Net()
X = normal(4, 5, 6)
TARGETS = jnp.zeros((4, 5, 3))
OPTIMIZER = optax.adam(0.01)


def _loss(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets), axis=(1, 2))


def _total_loss(outputs, targets):
    return jnp.mean(jnp.square(outputs))


def _step(state, batch):
    gradients = jax.grad(lambda params: jnp.mean(jnp.square(_apply(params, batch))))(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state)


def _apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"] + params["c"]


def _small():
    return {"a": normal(6, 8), "b": normal(8, 4), "c": normal(1, 4)}


def _variables():
    return NET.init(jax.random.key(0), X)


def _collected(**options):
    variables = _variables()
    return variables, jaxeff.collect(variables, NET.apply, X, **options)


def _report(**options):
    variables = _variables()
    return variables, jaxeff.analyze(variables, NET.apply, X, **options)


def _of_statistics():
    variables, statistics = _collected()
    return (variables, statistics), jaxeff.analyze(variables, statistics=statistics)


def _monitored():
    variables = _variables()
    return variables, jaxeff.monitor(every=2).init(variables, NET.apply, X)


def _merged():
    first, second = _collected()[1], _collected()[1]
    return (first, second), jaxeff.merge(first, second)


def _calibrated():
    variables, batches = _variables(), [X, X]
    return (variables, batches), jaxeff.calibrate(variables, NET.apply, batches, progress=False)


def _scored_by(criterion, **options):
    variables, statistics = _collected(criterion=criterion, **options)
    return (variables, statistics), prune.scored(variables, statistics, criterion)


def _of_masks(function):
    params = _small()
    masks = prune.masks(prune.scored(params), 0.5)
    return (params, masks), function(params, masks)


def _optimized(optimizer):
    """The state of an optimizer, after `init` and after a step."""
    params = _small()
    start = optimizer.init(params)
    updates, state = optimizer.update(params, start, params)
    return (params, start), (updates, state)


def _started(optimizer):
    params = _small()
    return params, optimizer.init(params)


def _shrunk():
    variables = _variables()
    plan = prune.Plan.of(prune.groups(variables, NET.apply, X), {"wide/kernel:1": [0, 3]})
    opt_state = OPTIMIZER.init(variables["params"])
    return (variables, opt_state), (
        prune.shrink(variables, plan),
        *prune.shrink(variables["params"], plan, opt_state),
    )


def _recalibrated():
    variables = Frozen().init(jax.random.key(0), X)
    return variables, prune.recalibrate(variables, Frozen().apply, [X])


class Frozen(nn.Module):
    """A BatchNorm that batches change, and one that they do not."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, name="frozen")(nn.BatchNorm(False, name="norm")(x))


def _total(state):
    return jnp.sum(state.params["a"])


def _pruned(recipe, *arguments, **options):
    params = _small()
    state = State(params, OPTIMIZER.init(params))
    step = jax.jit(_step, donate_argnums=0)
    pruned = recipe(state, step, [X[0]], _total, *arguments, steps=2, sparsity=0.5, progress=False, **options)
    return state, (pruned.state, pruned.masks)


def _sketched():
    x = jnp.abs(normal(100))
    one = sketch.count(x)
    return (x, one), (sketch.merge(one, one), sketch.summarize(one))


def _of_nnx():
    params, apply_fn = jaxeff.functional(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    return (params, apply_fn.state), jaxeff.monitor(every=1).init(params, apply_fn, X)


def _levels():
    variables, statistics = _collected()
    levels = [importance.scores(variables, statistics, level=level) for level in LEVELS]
    return (variables, statistics), levels


LEVELS = ("weight", "unit", "head", "layer")
KEY = {"key": jax.random.key(0)}
OPTIMIZERS = {
    "sparsify": lambda: prune.sparsify(OPTIMIZER, prune.cubic(0.5, begin=0, end=4, every=1)),
    "rigl": lambda: prune.rigl(OPTIMIZER, 0.5, end=4, every=1, **KEY),
    "sparse_evolution": lambda: prune.sparse_evolution(OPTIMIZER, 0.5, end=4, every=1, **KEY),
    "add_entropy_gradient": lambda: prune.add_entropy_gradient(0.1),
}
ROWS = {
    "analyze": _report,
    "analyze, curves": lambda: _report(curves=True),
    "analyze, magnitudes": lambda: (v := _variables(), jaxeff.analyze(v)),
    "analyze, statistics": _of_statistics,
    "analyze, gradients": lambda: _report(criterion="fisher", loss_fn=_loss, targets=TARGETS),
    "collect": _collected,
    "collect, gradients": lambda: _collected(criterion=("gradient", "lrp"), loss_fn=_loss, targets=TARGETS),
    "merge": _merged,
    "calibrate": _calibrated,
    "monitor": _monitored,
    "monitor of an NNX model": _of_nnx,
    "importance": _levels,
    "compare_criteria": lambda: (
        p := _small(),
        jaxeff.compare_criteria(
            p, _apply, X[0], targets=X[0], loss_fn=_total_loss, criteria=("magnitude", "taylor")
        ),
    ),
    "sensitivity": lambda: (
        p := _small(),
        prune.sensitivity(p, _apply, X[0], targets=X[0], loss_fn=_total_loss),
    ),
    "summarize": lambda: (x := jnp.abs(normal(100)), jaxeff.metrics.summarize(x)),
    "sketch": _sketched,
    "scored": lambda: (p := _small(), prune.scored(p)),
    "scored, whole numbers": lambda: (
        p := {"w": jnp.ones((2, 3), jnp.uint8)},
        prune.scored(p, prunable={"w": True}),
    ),
    "scored by activation": lambda: _scored_by("activation"),
    "scored by gradient": lambda: _scored_by("gradient", loss_fn=_loss, targets=TARGETS),
    "scored by snip": lambda: _scored_by("snip", loss_fn=_loss, targets=TARGETS),
    "masks": lambda: _of_masks(lambda params, masks: prune.masks(prune.scored(params), 0.5)),
    "masks, global": lambda: _of_masks(
        lambda params, masks: prune.masks(prune.scored(params), 0.5, scope="global", max_sparsity=0.9)
    ),
    "masks, n by m": lambda: _of_masks(
        lambda params, masks: prune.masks(
            prune.scored(params, prunable={"c": False}), pattern=prune.NByM(1, 2, axis=-2)
        )
    ),
    "apply": lambda: _of_masks(prune.apply),
    "straight_through": lambda: _of_masks(prune.straight_through),
    "pack": lambda: _of_masks(lambda params, masks: prune.pack(masks)),
    "unpack": lambda: _of_masks(lambda params, masks: prune.unpack(prune.pack(masks))),
    **{
        f"{name}, {when}": lambda optimizer=optimizer, make=make: make(optimizer())
        for when, make in (("at the start", _started), ("after a step", _optimized))
        for name, optimizer in OPTIMIZERS.items()
    },
    "shrink": _shrunk,
    "recalibrate": _recalibrated,
    "iterative": lambda: _pruned(prune.iterative, rounds=2),
    "iterative, stopped": lambda: _pruned(prune.iterative, rounds=2, max_drop=0.0),
    "gradual": lambda: _pruned(prune.gradual, every=1, fine_tune=1),
    "lottery_ticket": lambda: _pruned(prune.lottery_ticket, rounds=2),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_is_returned_may_be_donated_and_nothing_else_is_deleted(row):
    given, returned = row()
    # Not on the host: what NumPy looks at cannot be donated.
    expected = jax.tree.map(jnp.copy, returned)
    step = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)
    # Raises where a buffer occurs twice in what is donated.
    found = step(step(returned))
    donated = [leaf for leaf in jax.tree.leaves(returned) if isinstance(leaf, jax.Array) and leaf.size]
    on_host = [leaf for leaf in jax.tree.leaves(returned) if isinstance(leaf, np.ndarray)]
    # If nothing were donated, the test could not fail; a report is all on the host, in memory of its own.
    assert all(leaf.is_deleted() for leaf in donated) and (donated or on_host)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array)]
    assert not any(np.shares_memory(mine, leaf) for mine in on_host for leaf in arrays)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_monitored_step_may_donate_its_state_again_and_again():
    watch, variables = jaxeff.monitor(every=2, report_every=4), _variables()
    state = watch.init(variables, NET.apply, X)
    first = jax.tree.map(np.array, state.first)
    step = jax.jit(lambda state, params: watch.update(state, params, NET.apply, X), donate_argnums=0)
    for _ in range(5):
        state = step(state, variables)
    assert (int(state.step), int(state.analyzed)) == (5, 4)
    # The weights are the same at every step.
    jax.tree.map(np.testing.assert_array_equal, state.first, first)
    # Metrics of a traced report are computed in float32, those of the first on the host.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-6), state.previous, first)


def test_an_optimizer_that_prunes_may_be_donated_in_every_step():
    params = _small()
    for optimizer in OPTIMIZERS.values():
        state = State(own := jax.tree.map(jnp.copy, params), optimizer().init(own))

        def step(state, make=optimizer):
            gradients = jax.tree.map(jnp.ones_like, state.params)
            updates, opt_state = make().update(gradients, state.opt_state, state.params)
            return State(optax.apply_updates(state.params, updates), opt_state)

        step = jax.jit(step, donate_argnums=0)
        for _ in range(3):
            state = step(state)
        assert own["a"].is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_large_model_serves_on_after_the_small_one_is_donated():
    (variables, opt_state), (small, *_) = _shrunk()
    before = jax.tree.map(jnp.copy, (variables, opt_state))
    assert small["params"]["wide"]["kernel"].shape == (6, 6)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)(small))
    jax.tree.map(np.testing.assert_array_equal, (variables, opt_state), before)


def test_functional_shares_the_arrays_of_the_model():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    params, _ = jaxeff.functional(model)
    shared = zip(jax.tree.leaves(params), jax.tree.leaves(nnx.state(model)), strict=True)
    assert all(one is other for one, other in shared)
