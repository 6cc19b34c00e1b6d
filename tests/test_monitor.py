"""Analysis inside a training loop: when it happens, what it says, and what it leaves alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxeff

BATCH = jax.random.normal(jax.random.key(0), (32, 12))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24, name="hidden")(x))
        return nn.Dense(5, name="head")(x)


MODEL = MLP()
PARAMS = MODEL.init(jax.random.key(1), BATCH)
WATCH = jaxeff.monitor(every=3, report_every=3)


def _start():
    return WATCH.init(PARAMS, MODEL.apply, BATCH)


@jax.jit
def _update(state, params):
    return WATCH.update(state, params, MODEL.apply, BATCH)


def _same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A traced report is computed in float32, a concrete one finished on the host.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _scaled(factor):
    return jax.tree.map(lambda leaf: factor * leaf, PARAMS)


def test_reports_are_of_every_third_step_and_of_the_start():
    state = _start()
    _same(state.report, jaxeff.analyze(PARAMS, MODEL.apply, BATCH))
    for step in range(1, 8):
        state = _update(state, _scaled(1 + step))
        seen = step // 3 * 3
        assert (int(state.step), int(state.analyzed)) == (step, seen)
        _same(state.report, jaxeff.analyze(_scaled(1 + seen) if seen else PARAMS, MODEL.apply, BATCH))
    # Of step 3, whose weights are 4 times the first; effective parameters do not scale.
    np.testing.assert_allclose(state.previous.effective_params, state.first.effective_params, rtol=1e-5)


def test_a_loop_compiles_once(compilations):
    state = _update(_start(), PARAMS)
    with compilations() as compiled:
        for _ in range(4):
            state = _update(state, PARAMS)
    assert compiled.count == 0


def test_the_state_goes_through_scan():
    steps = jnp.arange(1.0, 8.0)

    def step(state, factor):
        state = WATCH.update(state, _scaled(1 + factor), MODEL.apply, BATCH)
        return state, state.report.model.utilization

    state, utilizations = jax.lax.scan(step, _start(), steps)
    assert (int(state.step), int(state.analyzed), utilizations.shape) == (7, 6, (7,))
    _same(state.report, jaxeff.analyze(_scaled(7), MODEL.apply, BATCH))


def test_gradient_criteria_take_targets():
    watch = jaxeff.monitor(
        every=1, criterion="taylor", loss_fn=optax.softmax_cross_entropy_with_integer_labels
    )
    targets = jnp.argmax(BATCH[:, :5], axis=-1)
    state = watch.init(PARAMS, MODEL.apply, BATCH, targets=targets)
    state = jax.jit(lambda state: watch.update(state, PARAMS, MODEL.apply, BATCH, targets=targets))(state)
    assert state.report.criterion == "taylor"


def test_nnx():
    params, apply_fn = jaxeff.from_nnx(nnx.Linear(12, 5, rngs=nnx.Rngs(0)))
    state = WATCH.init(params, apply_fn, BATCH)
    state = jax.jit(lambda state, params: WATCH.update(state, params, apply_fn, BATCH))(state, params)
    assert int(state.step) == 1


def _with(name, leaf, value):
    changed = {layer: dict(arrays) for layer, arrays in PARAMS["params"].items()}
    changed[name][leaf] = value(changed[name][leaf])
    return {"params": changed}


EVENTS = {
    "dead units": _with("hidden", "bias", lambda bias: bias.at[:3].set(-1e3)),
    "effective parameters": _with("head", "kernel", lambda kernel: kernel.at[1:].mul(1e-6)),
    "not finite": _with("hidden", "kernel", lambda kernel: kernel.at[0, 0].set(jnp.nan)),
}


@pytest.mark.parametrize("sign", EVENTS)
def test_events_say_what_changed_since_the_start(sign):
    state = _start()
    for _ in range(3):
        state = _update(state, EVENTS[sign])
    (event,) = [event for event in WATCH.events(state) if event.sign == sign]
    assert (event.step, event.path) == (
        3,
        "head/kernel" if sign == "effective parameters" else "hidden/kernel",
    )
    assert event.path in str(event) and "step 3" in str(event)
    if sign == "dead units":
        assert (event.first, event.previous, event.now, event.of) == (0, 0, 3, 24)
    if sign == "not finite":
        assert (event.first, event.previous, event.now, event.of) == (None, None, 1, 12 * 24)
        assert {(event.path, event.sign) for event in WATCH.events(state)} == {
            ("hidden/kernel", "not finite"),
            ("head/kernel", "fallen back"),
        }


def test_activations_that_are_not_finite_are_an_event():
    state = _start()
    update = jax.jit(lambda state, batch: WATCH.update(state, PARAMS, MODEL.apply, batch))
    for _ in range(3):
        state = update(state, BATCH.at[0, 0].set(jnp.nan))
    assert {(event.path, event.sign) for event in WATCH.events(state)} == {
        ("hidden/kernel", "fallen back"),
        ("head/kernel", "fallen back"),
    }
    assert "magnitude" in str(WATCH.events(state)[0])


def test_a_state_of_another_model_and_what_is_no_state():
    other = nn.Dense(5)
    params = other.init(jax.random.key(0), BATCH)
    with pytest.raises(ValueError, match="`state` belongs to another model"):
        jaxeff.monitor(every=1).update(_start(), params, other.apply, BATCH)
    for call in (
        lambda: WATCH.update(PARAMS, _start(), MODEL.apply, BATCH),
        lambda: WATCH.events(_start().report),
    ):
        with pytest.raises(TypeError, match="`state` must be a MonitorState"):
            call()


def test_a_network_that_stays_as_it_is_has_no_events():
    state = _start()
    assert WATCH.events(state) == ()
    for _ in range(3):
        state = _update(state, _scaled(2))
    assert WATCH.events(state) == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every": 0}, r"`every` must be a positive number of steps below 2\^31, got 0"),
        ({"every": 2.5}, "`every` must be"),
        ({"every": 1, "growth": 0}, "`growth` must be"),
        ({"every": 1, "collapse": 1.5}, "`collapse` must be"),
        ({"every": 1, "criterion": "fischer"}, "fischer"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        jaxeff.monitor(**arguments)
