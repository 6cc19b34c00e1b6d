"""Optimizers that hold copies of the weights, and training under masks that exist already."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from network import normal

from jaxeff import prune

PARAMS = {"layer": {"kernel": normal(8, 6), "bias": normal(6)}}
TARGETS = {"layer": {"kernel": normal(6, 8).T + 3, "bias": normal(6) - 3}}


def loss(params):
    """Each weight by itself: what is trained of one does not depend on the others."""
    return sum(
        jnp.sum(jnp.square(p - t)) for p, t in zip(*map(jax.tree.leaves, (params, TARGETS)), strict=True)
    )


def trained(optimizer, steps, params=PARAMS):
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(loss)(params.fast if isinstance(params, optax.LookaheadParams) else params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


SCHEDULE_FREE = optax.contrib.schedule_free_sgd(0.05, b1=0.8)
LABELS = {"layer": {"kernel": "a", "bias": "b"}}
# An optimizer, and what of its state and params evaluation reads.
AVERAGING = {
    "schedule free": (SCHEDULE_FREE, lambda state: state),
    "schedule free, Adam": (optax.contrib.schedule_free_adamw(0.05), lambda state: state),
    "accumulated": (optax.MultiSteps(SCHEDULE_FREE, 2), lambda state: state.inner_opt_state),
    "in a chain": (optax.chain(optax.clip(9.0), SCHEDULE_FREE), lambda state: state[1]),
    "injected": (
        optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(learning_rate=0.05),
        lambda state: state.inner_state,
    ),
    "if finite": (optax.apply_if_finite(SCHEDULE_FREE, 3), lambda state: state.inner_state),
}


@pytest.mark.parametrize(("optimizer", "averages"), AVERAGING.values(), ids=AVERAGING)
@pytest.mark.parametrize("half", ["sparsify", "masks", "rigl"])
def test_the_weights_that_schedule_free_evaluates_are_as_sparse_as_those_it_trains(optimizer, averages, half):
    masks = prune.masks(prune.scored(PARAMS), 0.5)
    if half == "rigl":
        wrapped = prune.rigl(optimizer, 0.5, key=jax.random.key(0), end=20, every=4)
    elif half == "masks":
        wrapped = prune.sparsify(optimizer, masks=masks)
    else:
        wrapped = prune.sparsify(optimizer, prune.one_shot(0.5))
    params, state = trained(wrapped, 12)
    evaluated = optax.contrib.schedule_free_eval_params(averages(state.inner), params)
    kept = state.masks["layer"]["kernel"]
    assert int(kept.sum()) == 24
    np.testing.assert_array_equal(evaluated["layer"]["kernel"] != 0, kept)
    if half == "rigl":
        return
    # Weights are trained one by one: those that stay are what dense training makes of them.
    np.testing.assert_array_equal(kept, masks["layer"]["kernel"])
    dense, state = trained(optimizer, 12)
    expected = prune.apply(optax.contrib.schedule_free_eval_params(averages(state), dense), masks)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), evaluated, expected)


COPYING = {
    "multi_transform": optax.multi_transform({"a": SCHEDULE_FREE, "b": optax.sgd(0.1)}, LABELS),
    "masked": optax.masked(SCHEDULE_FREE, {"layer": {"kernel": True, "bias": False}}),
    "average of updates": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 5),
    "mechanic": optax.contrib.mechanize(optax.sgd(0.1)),
    "distance over gradients": optax.contrib.dog(),
    "prodigy": optax.contrib.prodigy(),
    "sharpness": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "differences of weights": optax.lbfgs(linesearch=None),
    "momentum": optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", COPYING.values(), ids=COPYING)
def test_no_array_like_the_weights_holds_what_is_pruned(optimizer):
    params, state = trained(prune.sparsify(optimizer, prune.one_shot(0.5, step=3)), 7)
    kept = state.masks["layer"]["kernel"]
    assert int(kept.sum()) == 24
    alike = [leaf for leaf in jax.tree.leaves((params, state.inner)) if jnp.shape(leaf) == (8, 6)]
    assert len(alike) > 1
    for leaf in alike:
        np.testing.assert_array_equal(jnp.where(kept, 0, leaf), 0)


@pytest.mark.parametrize("half", ["sparsify", "rigl"])
def test_slow_weights_have_the_masks_of_the_fast_ones(half):
    lookahead = optax.lookahead(optax.sgd(0.05, momentum=0.5), sync_period=3, slow_step_size=0.5)
    start = optax.LookaheadParams.init_synced(PARAMS)
    if half == "rigl":
        optimizer = prune.rigl(lookahead, 0.5, key=jax.random.key(0), end=20, every=4)
    else:
        optimizer = prune.sparsify(lookahead, prune.one_shot(0.5))
    # Masks move at steps 4 and 8; what grows reaches the slow weights by step 12.
    params, state = trained(optimizer, 12, start)
    kept = state.masks["layer"]["kernel"]
    assert int(kept.sum()) == 24
    for weights in params:
        np.testing.assert_array_equal(weights["layer"]["kernel"] != 0, kept)
    if half == "sparsify":
        dense, _ = trained(lookahead, 12, start)
        close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5)  # noqa: E731
        jax.tree.map(close, params.slow, prune.apply(dense.slow, state.masks))


@pytest.mark.parametrize(
    "half",
    [
        lambda optimizer: prune.sparsify(optimizer, prune.one_shot(0.5)),
        lambda optimizer: prune.rigl(optimizer, 0.5, key=jax.random.key(0), end=20, every=4),
    ],
)
def test_copies_of_the_weights_that_no_mask_fits_are_refused(half):
    with pytest.raises(ValueError, match=r"a copy of the weights at 'z' of its state, in the shape \(54,\)"):
        half(optax.flatten(SCHEDULE_FREE)).init(PARAMS)
    # Moments are no copies, whatever their shape.
    _ = half(optax.flatten(optax.adam(0.1))).init(PARAMS)
    _ = half(optax.adafactor(0.1, min_dim_size_to_factor=2)).init(PARAMS)


# Masks that exist already

GIVEN = prune.masks(prune.scored(PARAMS), 0.25)


def test_training_under_masks_is_dense_training_of_what_they_keep():
    params, state = trained(prune.sparsify(optax.adam(0.1), masks=GIVEN), 8)
    expected = prune.apply(trained(optax.adam(0.1), 8)[0], GIVEN)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), params, expected)
    jax.tree.map(np.testing.assert_array_equal, state.masks, GIVEN)


def test_masks_of_zeros_and_ones_and_of_variables_will_do():
    masks = {"params": jax.tree.map(lambda mask: np.asarray(mask, np.float32), GIVEN)}
    optimizer = prune.sparsify(optax.sgd(0.1), masks=masks)
    variables = {"params": PARAMS}
    updates, state = optimizer.update(variables, optimizer.init(variables), variables)
    kernel = optax.apply_updates(variables, updates)["params"]["layer"]["kernel"]
    np.testing.assert_array_equal(kernel != 0, GIVEN["layer"]["kernel"])
    assert state.masks["params"]["layer"]["kernel"].dtype == bool


def test_the_state_does_not_share_arrays_with_the_masks():
    state = prune.sparsify(optax.sgd(0.1), masks=GIVEN).init(PARAMS)
    jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)(state)
    assert not GIVEN["layer"]["kernel"].is_deleted() and not GIVEN["layer"]["bias"].is_deleted()


def test_a_schedule_prunes_further_inside_the_masks():
    # The masks remove the largest weights: by magnitude alone others would go first.
    largest = prune.masks(
        {"layer": {"kernel": 9 - jnp.abs(PARAMS["layer"]["kernel"]), "bias": jnp.zeros(())}}, 0.25
    )
    optimizer = prune.sparsify(optax.sgd(0.0), prune.periodic(0.5, 2, 4, 2), masks=largest)
    for steps, count in ((1, 36), (2, 36), (3, 24), (6, 24)):
        params, state = trained(optimizer, steps)
        kept = np.asarray(state.masks["layer"]["kernel"])
        assert kept.sum() == count and not (kept & ~largest["layer"]["kernel"]).any()
        np.testing.assert_array_equal(params["layer"]["kernel"] != 0, kept)
    # 12 of 48 were gone; the 12 smallest of the others follow.
    left = np.where(largest["layer"]["kernel"], np.abs(PARAMS["layer"]["kernel"]), np.inf)
    removed = np.zeros(48, bool)
    removed[np.argsort(left.ravel())[:12]] = True
    np.testing.assert_array_equal(kept, ~removed.reshape(8, 6) & np.asarray(largest["layer"]["kernel"]))


def test_a_schedule_that_asks_for_less_than_the_masks_remove_changes_nothing():
    optimizer = prune.sparsify(optax.sgd(0.1), prune.cubic(0.5, 0, 100, 1), masks=GIVEN)
    assert prune.sparsity(trained(optimizer, 3)[1].masks) == 0.25


def test_scores_of_gradients_bring_back_only_what_the_masks_keep():
    rank = jnp.arange(48.0).reshape(8, 6)
    # What the first step removes scores highest from the second on.
    scores = lambda params, gradients: {  # noqa: E731
        "layer": {
            "kernel": jnp.where((params["layer"]["kernel"] == 0).sum() > 12, 99 - rank, rank),
            "bias": jnp.zeros(()),
        }
    }
    given = {"layer": {"kernel": rank >= 12, "bias": jnp.asarray(True)}}
    optimizer = prune.sparsify(optax.sgd(0.0), prune.periodic(0.5, 0, 9, 1), masks=given, importance=scores)
    _, first = trained(optimizer, 1)
    _, last = trained(optimizer, 2)
    np.testing.assert_array_equal(first.masks["layer"]["kernel"], rank >= 24)
    np.testing.assert_array_equal(last.masks["layer"]["kernel"], (rank >= 12) & (rank < 36))


def test_packed_masks_are_unpacked_first():
    masks = prune.pack(GIVEN)
    with pytest.raises(ValueError, match="`masks` must match the params"):
        prune.sparsify(optax.sgd(0.1), masks=masks).init(PARAMS)
    _ = prune.sparsify(optax.sgd(0.1), masks=prune.unpack(masks)).init(PARAMS)


WRONG = {
    "neither": (lambda: prune.sparsify(optax.sgd(0.1)), "`schedule` is missing"),
    "scope": (lambda: prune.sparsify(optax.sgd(0.1), masks=GIVEN, scope="global"), "`scope` needs a"),
    "pattern": (
        lambda: prune.sparsify(optax.sgd(0.1), masks=GIVEN, pattern=prune.NByM(2, 4)),
        "`pattern` needs a",
    ),
    "other shapes": (
        lambda: prune.sparsify(optax.sgd(0.1), masks=GIVEN).init(
            {"layer": {"kernel": jnp.ones((2, 6)), "bias": jnp.ones(6)}}
        ),
        "`masks` must match the params: 'layer/kernel'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
