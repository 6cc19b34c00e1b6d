"""Analysis inside a training loop: when it happens, what it says, and what it leaves alone."""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxeff
from jaxeff.monitoring._names import USUAL

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
    params, apply_fn = jaxeff.functional(nnx.Linear(12, 5, rngs=nnx.Rngs(0)))
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


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4, name="head")(blocks(name="blocks")(x, None)[0])


def _linen():
    return PARAMS, MODEL.apply, BATCH


def _nnx():
    params, apply_fn = jaxeff.functional(nnx.Sequential(nnx.Linear(12, 24, rngs=nnx.Rngs(0)), nnx.relu))
    return params, apply_fn, BATCH


def _stacked():
    batch = jax.random.normal(jax.random.key(3), (4, 5, 8))
    return Stacked().init(jax.random.key(4), batch)["params"], Stacked().apply, batch


def _half():
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS), MODEL.apply, BATCH


NETWORKS = {"linen": _linen, "nnx": _nnx, "stacked blocks": _stacked, "bfloat16": _half}


def _trees(params):
    """Gradients and updates that look like nothing else, with a nan in the first gradient."""
    gradients = jax.tree.map(lambda leaf: jnp.sin(3 * leaf) + 0.25, params)
    updates = jax.tree.map(lambda leaf: 1e-3 * jnp.cos(leaf), params)
    return {"gradients": gradients, "updates": updates}


def _step_of(network, watch):
    params, apply_fn, batch = NETWORKS[network]()
    return params, lambda state: watch.update(state, params, apply_fn, batch, **_trees(params))


WAYS = {
    "eager": lambda step: step,
    "jitted": jax.jit,
    "donated": lambda step: jax.jit(step, donate_argnums=0),
}


def _by_hand(tree, stacks=()):
    """Norms of the tree, of all modules and leaves, and of each block under the paths in `stacks`."""
    flat = {
        "/".join(
            str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys
        ): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    flat = {
        path.removeprefix("params/").removesuffix("/value"): np.asarray(leaf, np.float64)
        for path, leaf in flat.items()
    }
    found = {"": [*flat.values()]}
    for path, leaf in flat.items():
        keys = path.split("/")
        for count in range(1, len(keys) + 1):
            name = "/".join(keys[:count])
            found.setdefault(name, []).append(leaf)
            if any(name == stack or name.startswith(f"{stack}/") for stack in stacks):
                for index, block in enumerate(leaf):
                    found.setdefault(f"{name}[{index}]", []).append(block)
    return {name: np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)) for name, leaves in found.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_norms_are_those_computed_by_hand(network, way):
    watch = jaxeff.monitor(every=1)
    params, step = _step_of(network, watch)
    state = WAYS[way](step)(watch.init(*NETWORKS[network]()))
    found = watch.scalars(state, "*")
    stacks = ["blocks"] if network == "stacked blocks" else []
    norms = {name: _by_hand(tree, stacks) for name, tree in {"params": params, **_trees(params)}.items()}
    for tree, expected in norms.items():
        named = {f"{tree}/norm" + f"/{name}" * bool(name): value for name, value in expected.items()}
        logged = {name: value for name, value in found.items() if name.startswith(f"{tree}/norm")}
        assert logged == pytest.approx(named, rel=2e-6)
    for name, value in norms["updates"].items():
        ratio = "updates/ratio" + f"/{name}" * bool(name)
        with np.errstate(divide="ignore"):
            assert found[ratio] == pytest.approx(value / norms["params"][name], rel=4e-6)
    assert all(value == 0 for name, value in found.items() if "/nonfinite" in name)


@pytest.mark.parametrize("way", WAYS)
def test_activations_are_those_computed_by_hand(way):
    watch = jaxeff.monitor(every=1, tau=0.5)
    _, step = _step_of("linen", watch)
    found = watch.scalars(WAYS[way](step)(_started(watch, "linen")), "activations/*")
    hidden, last = (jax.tree.map(np.asarray, PARAMS["params"][name]) for name in ("hidden", "head"))
    emitted = np.maximum(np.asarray(BATCH) @ hidden["kernel"] + hidden["bias"], 0)
    head = emitted @ last["kernel"] + last["bias"]
    for path, a in {"hidden/kernel": emitted, "head/kernel": head}.items():
        mean = np.abs(a).mean(0)
        assert found[f"activations/dead_units/{path}"] == np.sum(mean == 0)
        assert found[f"activations/dormant_units/{path}"] == np.sum(mean <= 0.5 * mean.mean())
        assert found[f"activations/zero_fraction/{path}"] == pytest.approx(np.mean(a == 0))
        crest = np.abs(a).max() / np.sqrt(np.mean(a**2))
        assert found[f"activations/crest_factor/{path}"] == pytest.approx(crest, rel=1e-5)
    assert 0 < found["activations/dormant_units"] < 24
    zeros = np.mean(emitted == 0), np.mean(head == 0)
    assert found["activations/zero_fraction"] == pytest.approx(np.average(zeros, weights=(24, 5)))


def _started(watch, network):
    return watch.init(*NETWORKS[network]())


@pytest.mark.parametrize("way", WAYS)
def test_attention_is_that_computed_by_hand(way):
    watch = jaxeff.monitor(every=1)
    params, step = _step_of("stacked blocks", watch)
    found = watch.scalars(WAYS[way](step)(_started(watch, "stacked blocks")), "attention/*")
    x, logits = _stacked()[2], []
    for block in range(3):
        own = jax.tree.map(lambda leaf, block=block: leaf[block], params["blocks"])
        normed = nn.LayerNorm().apply({"params": own["norm"]}, x)
        query, key = (
            np.einsum("btf,fhd->bthd", normed, own["attention"][name]["kernel"])
            + np.asarray(own["attention"][name]["bias"])
            for name in ("query", "key")
        )
        logits.append(np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(4))
        x = Block().apply({"params": own}, x, None)[0]
    for block, each in enumerate(logits):
        p = np.exp(each) / np.exp(each).sum(-1, keepdims=True)
        entropy = -np.sum(p * np.log(p), -1).mean((0, 2))
        path = f"blocks/attention[{block}]"
        assert found[f"attention/largest_logit/{path}"] == pytest.approx(each.max(), rel=1e-5)
        assert found[f"attention/entropy/{path}"] == pytest.approx(entropy.mean(), rel=1e-5)
        assert found[f"attention/lowest_entropy/{path}"] == pytest.approx(entropy.min(), rel=1e-5)
    assert found["attention/largest_logit"] == pytest.approx(max(each.max() for each in logits), rel=1e-5)


def _experts():
    """Three matrices in one batched product, and a convolution of the result."""
    params = {
        "experts": jax.random.normal(jax.random.key(5), (3, 6, 4)),
        "taps": jax.random.normal(jax.random.key(6), (2, 4, 5)),
    }

    def apply_fn(params, x):
        x = jax.nn.relu(jnp.einsum("ebi,eio->ebo", x, params["experts"]))
        return jax.lax.conv_general_dilated(
            x, params["taps"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    return params, apply_fn, jax.random.normal(jax.random.key(7), (3, 8, 6))


@pytest.mark.parametrize("network", [_stacked, _half, _experts])
def test_ranks_are_those_of_the_spectra(network):
    watch = jaxeff.monitor(every=1, report_every=1, spectra=True)
    params, apply_fn, batch = network()
    start = watch.init(jax.tree.map(jnp.ones_like, params), apply_fn, batch)
    state = jax.jit(lambda state, params: watch.update(state, params, apply_fn, batch))(start, params)
    found = watch.scalars(state, "spectra/*")
    rows = jaxeff.spectra(params, apply_fn, batch, share=None).rows
    for number in ("effective_rank", "stable_rank"):
        expected = {f"spectra/{number}/{row.path}": getattr(row, number) for row in rows}
        expected[f"spectra/{number}"] = np.mean([*expected.values()])
        assert {name: found[name] for name in found if number in name} == pytest.approx(expected, rel=1e-5)


def _spectrum_of(values):
    """A matrix [values, 64] with these singular values."""
    draw = np.random.default_rng(0).normal
    left, right = (np.linalg.qr(draw(size=(size, len(values))))[0] for size in (len(values), 64))
    return left * np.asarray(values) @ right.T


RANKED = {
    "noise": np.random.default_rng(1).normal(size=(48, 64)),
    "decaying": _spectrum_of(np.exp(-np.arange(64.0) / 2)),
    "of rank 3": _spectrum_of([3, 2, 1] + [0] * 61),
    "of rank 1, half of the units dead": np.outer(np.arange(48), np.arange(64) % 2),
    "large": 1e30 * _spectrum_of(np.arange(64.0)),
    "small": 1e-30 * _spectrum_of(np.arange(64.0)),
    "of one unit": np.ones((48, 1)),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks_are_those_of_numpy(name):
    weight = RANKED[name].astype(np.float32)
    batch = np.ones((2, len(weight)), np.float32)
    watch = jaxeff.monitor(every=1, spectra=True)
    found = watch.scalars(watch.init({"w": weight}, lambda p, x: x @ p["w"], batch), "spectra/*/w")
    s = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    p = s[s > 0] / np.sum(s)
    # In float32 each of n singular values is off by about eps max s, which moves the entropy of p by up to
    # n eps ln(1 / eps): for n = 64, 1.2e-4. Of these matrices none is off by more than a tenth of that.
    assert found["spectra/effective_rank/w"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-4)
    assert found["spectra/stable_rank/w"] == pytest.approx(np.sum((s / s[0]) ** 2), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_weight_without_ranks_is_nan_and_left_out_of_the_mean(value):
    watch = jaxeff.monitor(every=1, report_every=1, spectra=True)
    changed = _with("head", "kernel", lambda kernel: jnp.full_like(kernel, value))
    state = watch.init(PARAMS, MODEL.apply, BATCH)
    found = watch.scalars(watch.update(state, changed, MODEL.apply, BATCH), "spectra/*")
    for number in ("spectra/effective_rank", "spectra/stable_rank"):
        assert np.isnan(found[f"{number}/head/kernel"])
        assert found[number] == pytest.approx(found[f"{number}/hidden/kernel"]) and found[number] > 1


def test_ranks_are_measured_with_reports_alone():
    watch = jaxeff.monitor(every=1, report_every=2, spectra=True)
    update = jax.jit(lambda state, params: watch.update(state, params, MODEL.apply, BATCH))
    state, seen = watch.init(PARAMS, MODEL.apply, BATCH), []
    narrowed = _with("hidden", "kernel", lambda kernel: kernel.at[:, 1:].set(0))
    for _ in range(2):
        state = update(state, narrowed)
        seen.append(watch.scalars(state, "spectra/*/hidden/kernel")["spectra/effective_rank/hidden/kernel"])
    assert seen[0] > 6 and seen[1] == pytest.approx(1, rel=1e-5)
    assert state.ranks.paths == ("hidden/kernel", "head/kernel")


def test_without_spectra_there_are_no_ranks_and_such_states_are_refused():
    assert _start().ranks is None
    assert not any(name.startswith("spectra") for name in WATCH.scalars(_start(), "*"))
    watch = jaxeff.monitor(every=1, spectra=True)
    with pytest.raises(ValueError, match="`state` comes from a monitor with `spectra=False`"):
        watch.update(_start(), PARAMS, MODEL.apply, BATCH)


@pytest.mark.parametrize("network", ["linen", "stacked blocks"])
def test_params_before_a_step_stand_for_its_updates(network):
    watch = jaxeff.monitor(every=2)
    before, apply_fn, batch = NETWORKS[network]()
    start = watch.init(before, apply_fn, batch)

    def train(way):
        def step(carry, _):
            params, state = carry
            new = jax.tree.map(lambda leaf: leaf + 0.125 * jnp.sign(leaf), params)
            given = params if way == "params_before" else jax.tree.map(jnp.subtract, new, params)
            return (new, watch.update(state, new, apply_fn, batch, **{way: given})), None

        return watch.scalars(jax.lax.scan(step, (before, start), length=3)[0][1], "updates/*", "params/*")

    found, expected = train("params_before"), train("updates")
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True) and found["updates/norm"] > 0


def test_elements_that_are_not_finite_are_counted_and_events_name_them():
    watch = jaxeff.monitor(every=1)
    bad = _with("head", "kernel", lambda kernel: kernel.at[0, :2].set(jnp.nan))
    state = watch.update(_start(), PARAMS, MODEL.apply, BATCH, gradients=bad)
    assert watch.scalars(state)["gradients/nonfinite"] == 2 and watch.scalars(state)["params/nonfinite"] == 0
    assert watch.scalars(state, "gradients/nonfinite/*")["gradients/nonfinite/head/kernel"] == 2
    (event,) = watch.events(state)
    assert (event.sign, event.path, event.now, event.of) == ("gradient not finite", "head/kernel", 2, 24 * 5)
    assert str(event) == "step 1: head/kernel: 2 of 120 elements of the gradient are not finite"


def test_what_is_not_passed_is_not_logged():
    watch = jaxeff.monitor(every=1)
    assert not any(name.startswith(("gradients", "updates")) for name in watch.scalars(_start(), "*"))
    state = watch.update(_start(), PARAMS, MODEL.apply, BATCH, updates=PARAMS)
    assert watch.scalars(state)["updates/ratio"] == 1
    assert not any(name.startswith("gradients") for name in watch.scalars(state, "*"))


def test_trees_unlike_the_params_are_refused():
    watch = jaxeff.monitor(every=1)
    with pytest.raises(
        ValueError, match=r"`gradients` must have the leaves of `params`: 'head/bias'.*no such leaf"
    ):
        watch.update(_start(), PARAMS, MODEL.apply, BATCH, gradients={"hidden": PARAMS["params"]["hidden"]})


def test_updates_are_passed_in_one_way():
    watch = jaxeff.monitor(every=1)
    with pytest.raises(ValueError, match="pass `updates` or `params_before`, not both"):
        watch.update(_start(), PARAMS, MODEL.apply, BATCH, updates=PARAMS, params_before=PARAMS)
    with pytest.raises(ValueError, match=r"`params_before` must have the leaves of `params`: 'head/bias'"):
        watch.update(
            _start(), PARAMS, MODEL.apply, BATCH, params_before={"hidden": PARAMS["params"]["hidden"]}
        )


def _scaled_attention(factor):
    params, apply_fn, batch = _stacked()
    query = jax.tree.map(lambda leaf: factor * leaf, params["blocks"]["attention"]["query"])
    attention = {**params["blocks"]["attention"], "query": query}
    return {**params, "blocks": {**params["blocks"], "attention": attention}}, apply_fn, batch


def test_attention_events_fire_at_their_limits():
    given = _scaled_attention(1e3)
    start = jaxeff.monitor(every=1).init(*_stacked())
    state = jaxeff.monitor(every=1).update(start, *given)
    vitals = state.vitals.attention
    largest, entropy = (float(np.max(vitals.largest_logit)), np.asarray(vitals.entropy))
    fallen = entropy / np.asarray(start.vitals.attention.entropy)

    def signs(**limits):
        watch = jaxeff.monitor(every=1, **limits)
        return [
            (event.sign, event.path) for event in watch.events(state) if event.sign.startswith("attention")
        ]

    at = int(np.argmax(vitals.largest_logit))
    only = {"entropy_collapse": 1e-9}
    assert signs(largest_logit=largest, **only) == [("attention logit", f"blocks/attention[{at}]")]
    assert signs(largest_logit=np.nextafter(largest, np.inf), **only) == []
    lowest = int(np.argmin(fallen))
    assert signs(entropy_collapse=float(fallen[lowest]) * 1.000001, largest_logit=1e9) == [
        ("attention entropy", f"blocks/attention[{lowest}]")
    ]
    assert signs(entropy_collapse=float(fallen[lowest]) * 0.999999, largest_logit=1e9) == []


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_update_ratio_is_told_outside_of_its_band(share):
    state = jaxeff.monitor(every=1).update(
        _start(), PARAMS, MODEL.apply, BATCH, updates=jax.tree.map(lambda leaf: share * leaf, PARAMS)
    )

    def told(low, high):
        return [
            (event.path, event.now, event.of)
            for event in jaxeff.monitor(every=1, update_ratio=(low, high)).events(state)
            if event.sign == "update ratio"
        ]

    weights = ("hidden/kernel", "head/kernel")
    assert told(share, 2 * share) == told(share / 2, share) == []
    assert told(2 * share, 4.0) == [(path, share, 2 * share) for path in weights]
    assert told(0, share / 2) == [(path, share, share / 2) for path in weights]


def test_dormant_units_that_rise_are_an_event():
    quiet = _with("hidden", "kernel", lambda kernel: kernel.at[:, :3].mul(1e-3))
    watch = jaxeff.monitor(every=1)
    state = watch.update(_start(), quiet, MODEL.apply, BATCH)
    (event,) = watch.events(state)
    assert (event.sign, event.path, event.first, event.now, event.of) == (
        "dormant units", "hidden/kernel", 0, 3, 24,
    )  # fmt: skip
    assert jaxeff.monitor(every=1, growth=4 / 24).events(state) == ()


def test_reports_are_rarer_than_checks_and_their_events_are_told_once():
    watch = jaxeff.monitor(every=1, report_every=2)
    update = jax.jit(lambda state, params: watch.update(state, params, MODEL.apply, BATCH))
    state, fewer, seen = _start(), EVENTS["effective parameters"], []
    for _ in range(4):
        state = update(state, fewer)
        told = any(event.sign == "effective parameters" for event in watch.events(state))
        seen.append((int(state.checked), int(state.analyzed), told))
    assert seen == [(1, 0, False), (2, 2, True), (3, 2, False), (4, 4, True)]


def test_a_step_that_knows_when_to_check_compiles_twice_and_no_more(compilations):
    watch = jaxeff.monitor(every=2)

    @functools.partial(jax.jit, static_argnames="check", donate_argnums=0)
    def step(state, check):
        return watch.update(state, PARAMS, MODEL.apply, BATCH, check_now=check, **_trees(PARAMS))

    state = _start()
    for at in (1, 2):
        state = step(state, check=at % 2 == 0)
    with compilations() as compiled:
        for at in range(3, 9):
            state = step(state, check=at % 2 == 0)
    assert compiled.count == 0 and (int(state.step), int(state.checked)) == (8, 8)


def test_an_eager_loop_compiles_once(compilations):
    watch = jaxeff.monitor(every=2, report_every=2)
    state = _start()
    for _ in range(4):
        state = watch.update(state, PARAMS, MODEL.apply, BATCH, **_trees(PARAMS))
    with compilations() as compiled:
        for _ in range(4):
            state = watch.update(state, PARAMS, MODEL.apply, BATCH, **_trees(PARAMS))
    assert compiled.count == 0 and int(state.analyzed) == 8


def test_the_usual_numbers_are_documented():
    text = (Path(__file__).parents[1] / "docs" / "monitor.md").read_text(encoding="utf-8")
    documented = re.findall(r"`((?:gradients|params|updates|activations|attention|spectra)/\w+)`", text)
    assert set(USUAL) <= set(documented)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every": 0}, r"`every` must be a positive number of steps below 2\^31, got 0"),
        ({"every": 2.5}, "`every` must be"),
        ({"every": 1, "growth": 0}, "`growth` must be"),
        ({"every": 1, "collapse": 1.5}, "`collapse` must be"),
        ({"every": 1, "criterion": "fischer"}, "fischer"),
        ({"every": 2, "report_every": 3}, "`report_every` must be a multiple of `every`, 2; got 3"),
        ({"every": 1, "tau": 1}, "`tau` must be"),
        ({"every": 1, "largest_logit": 0}, "`largest_logit` must be"),
        ({"every": 1, "entropy_collapse": 0}, "`entropy_collapse` must be"),
        ({"every": 1, "update_ratio": (0.1, 0.1)}, "`update_ratio` must be"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        jaxeff.monitor(**arguments)
