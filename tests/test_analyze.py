"""The pipeline as users call it: what it computes, what it compiles, what it says of bad input."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax.training.train_state import TrainState
from networks import NETWORKS, Square, drawn, normal

import jaxeff
from jaxeff import importance, prune
from jaxeff.report import page

LAYERS = [f"layer{index}/kernel" for index in range(3)]


@pytest.fixture(scope="module")
def square():
    return NETWORKS["square"]()


@pytest.fixture(scope="module")
def report(square):
    return jaxeff.analyze(*square.arguments)


def _importance(network, path):
    """abs(w_ij) mean abs(a_j) from a float64 forward pass of the square network."""
    x = np.asarray(network.batch[0], np.float64)
    for name in LAYERS:
        layer = network.variables["params"][name.split("/")[0]]
        kernel = np.asarray(layer["kernel"], np.float64)
        x = np.maximum(x @ kernel + np.asarray(layer["bias"], np.float64), 0)
        if name == path:
            return np.abs(kernel) * np.abs(x).mean(0)
    raise KeyError(path)


def _assert_equal(ours, theirs, rtol=1e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Near 0 (redundancy, a Gini of equal weights) what counts is the size of the terms.
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def _with(variables, layer, change):
    """The variables with `change(kernel)` in one layer."""
    params = dict(variables["params"])
    params[layer] = {**params[layer], "kernel": change(params[layer]["kernel"])}
    return {**variables, "params": params}


def _finite(layer):
    return bool(np.isfinite(float(layer.metrics.utilization)))


# What is computed


@pytest.mark.parametrize("path", LAYERS)
def test_metrics_are_those_of_weight_times_mean_activation(path, square, report):
    expected = reference.metrics(_importance(square, path))
    for field, value in expected.items():
        # The activations are float32 sums, the metrics are good to 1e-6.
        assert float(getattr(report[path].metrics, field)) == pytest.approx(value, rel=1e-5), field


@pytest.mark.parametrize("path", LAYERS)
def test_effective_params_are_effective_units_times_effective_fan_in(path, square, report):
    scores, layer = _importance(square, path), report[path]
    units = scores.sum(0)
    within = [reference.entropy(column) if column.any() else 0 for column in scores.T]
    fan_in = np.exp(np.average(within, weights=units))
    np.testing.assert_allclose(layer.units, units, rtol=1e-5)
    assert float(layer.effective_units) == pytest.approx(np.exp(reference.entropy(units)), rel=1e-5)
    assert float(layer.effective_fan_in) == pytest.approx(fan_in, rel=1e-5)


def test_model_numbers_are_sums_over_layers_and_the_pooled_distribution(square, report):
    scores = [_importance(square, path) for path in LAYERS]
    each = [reference.metrics(score) for score in scores]
    pooled = reference.metrics(np.concatenate(scores))
    effective = sum(layer["effective_params"] for layer in each)
    expected = {
        "total_params": 3 * 72,
        "weights": 3 * 64,
        "effective_params": effective,
        "utilization": effective / 192,
        "compression_potential": 1 - effective / 192,
        "average_redundancy": np.mean([layer["redundancy"] for layer in each]),
        "sparsity_1e2": np.mean([layer["sparsity_1e2"] for layer in each]),
        "relative_sparsity_1e2": np.mean([layer["relative_sparsity_1e2"] for layer in each]),
        "pooled_effective_params": pooled["effective_params"],
        "pooled_utilization": pooled["utilization"],
        "excluded": 0,
    }
    for field, value in expected.items():
        assert float(getattr(report.model, field)) == pytest.approx(value, rel=1e-5), field


def test_rows_describe_the_layers(report):
    assert list(report.layers) == LAYERS
    assert report.unpaired == {} and report.analyzed_params == 192
    for layer in report.layers.values():
        assert (layer.kind, layer.shape, layer.nonlinearity) == ("dense", (8, 8), "relu")
        assert (layer.side, layer.note, layer.uses, layer.macs) == ("post", "", 1, 64)
    assert [(other.path, other.role) for other in report.others] == [
        (f"layer{index}/bias", "bias") for index in range(3)
    ]


def test_biases_are_described_by_their_own_numbers(square, report):
    for other in report.others:
        bias = np.asarray(square.variables["params"][other.path.split("/")[0]]["bias"], np.float64)
        assert float(other.mean_absolute) == pytest.approx(np.abs(bias).mean(), rel=1e-6)
        assert float(other.rms) == pytest.approx(np.sqrt(np.mean(bias**2)), rel=1e-6)
        assert (int(other.zeros), int(other.nonfinite)) == (0, 0)


def test_untrained_weights_are_near_their_null():
    # The standard error of the utilization of 64 x 96 normal weights is 0.005.
    w, x = normal(64, 96), normal(256, 64, seed=8)
    layer = jaxeff.analyze({"w": w}, lambda params, x: nn.relu(x @ params["w"]), x)["w"]
    assert float(layer.metrics.utilization) == pytest.approx(float(layer.null.utilization), abs=0.02)
    assert float(layer.metrics.gini) == pytest.approx(float(layer.null.gini), abs=0.02)
    assert float(layer.metrics.coverage_80) == pytest.approx(float(layer.null.coverage_80), abs=0.02)


def test_the_null_of_magnitudes_is_the_half_normals(square):
    layer = jaxeff.analyze(square.variables)[LAYERS[0]]
    # exp(H) / N of |z|, z normal, and its Gini coefficient, both by integration.
    assert float(layer.null.utilization) == pytest.approx(0.753, abs=1e-3)
    assert float(layer.null.gini) == pytest.approx(2**0.5 - 1, abs=1e-3)


def test_magnitude_alone_needs_no_batch(square):
    report = jaxeff.analyze(square.variables)
    assert report.criterion == "magnitude" and list(report.layers) == LAYERS
    for path, layer in report.layers.items():
        kernel = square.variables["params"][path.split("/")[0]]["kernel"]
        expected = reference.metrics(np.abs(kernel))
        assert layer.side == "magnitude" and layer.activity is None
        assert float(layer.metrics.utilization) == pytest.approx(expected["utilization"], rel=1e-6)


def test_params_may_come_without_their_variables_dict(square, report):
    _assert_equal(jaxeff.analyze(square.variables["params"], *square.arguments[1:]), report)


def theirs(weight, site):
    return jnp.abs(weight) * site.input.rms


@pytest.mark.parametrize(("criterion", "side"), [(theirs, "user"), ("wanda", "input")])
def test_a_criterion_of_the_input_is_a_function_of_weight_and_site(criterion, side, square):
    report = jaxeff.analyze(*square.arguments, criterion=criterion)
    kernel = np.asarray(square.variables["params"]["layer0"]["kernel"], np.float64)
    rms = np.sqrt(np.mean(np.asarray(square.batch[0], np.float64) ** 2, axis=0))
    expected = reference.metrics(np.abs(kernel) * rms[:, None])
    layer = report[LAYERS[0]]
    assert (layer.side, layer.null is None) == (side, side == "user")
    assert float(layer.metrics.gini) == pytest.approx(expected["gini"], rel=1e-5)


def test_wanda_of_an_input_that_is_always_zero_is_zero():
    x = jnp.ones((4, 3)).at[:, 1].set(0)
    statistics = jaxeff.collect({"w": jnp.ones((3, 2))}, lambda p, x: x @ p["w"], x)
    scores = importance.score(importance.wanda, jnp.ones((3, 2)), statistics.sites)
    np.testing.assert_allclose(scores, [[1, 1], [0, 0], [1, 1]])


def test_statistics_may_be_collected_before(square, report):
    statistics = jaxeff.collect(*square.arguments)
    _assert_equal(jaxeff.analyze(square.variables, statistics=statistics), report)


def test_shared_weights_are_scored_over_all_positions_of_all_uses():
    w, x, z = normal(4, 4), normal(10, 4), normal(30, 4, seed=8)
    function = lambda params, x, z: (jnp.tanh(x @ params["w"]), nn.relu(z @ params["w"]))  # noqa: E731
    layer = jaxeff.analyze({"w": w}, function, (x, z), criterion=_activation)["w"]
    emitted = [np.tanh(x.astype(np.float64) @ w), np.maximum(z.astype(np.float64) @ w, 0)]
    mean = np.concatenate([np.abs(a) for a in emitted]).mean(0)
    assert layer.uses == 2
    np.testing.assert_allclose(layer.units, (np.abs(w) * mean).sum(0), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["wanda", "ria"])
def test_criteria_of_inputs_take_all_uses_of_a_shared_weight_as_one(criterion):
    """Written out or in a loop, the root mean square is that of the inputs of all uses."""
    w, x = normal(6, 6) / 3, normal(10, 6)

    def unrolled(params, x):
        for _ in range(3):
            x = 2 * jnp.tanh(x @ params["w"])
        return x

    def looped(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: 2 * jnp.tanh(x @ params["w"]), x)

    inputs, size = [x.astype(np.float64)], np.abs(w)
    for _ in range(2):
        inputs.append(2 * np.tanh(inputs[-1] @ w))
    rms = np.sqrt(np.mean(np.square(np.concatenate(inputs)), 0))[:, None]
    expected = size * rms
    if criterion == "ria":
        expected = (size / size.sum(0, keepdims=True) + size / size.sum(1, keepdims=True)) * np.sqrt(rms)
    for function in (unrolled, looped):
        statistics = jaxeff.collect({"w": w}, function, x, criterion=criterion)
        found = jaxeff.importance.scores({"w": w}, statistics, criterion)["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def _activation(weight, site):
    # A user's own has no null, which would take most of the time.
    return jaxeff.importance.activation(weight, site)


def test_statistics_are_float64_in_a_float64_model(x64):
    w, x = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1).normal(size=(50, 3))
    (site,) = jaxeff.collect({"w": w}, lambda params, x: jnp.tanh(x @ params["w"]), x).sites
    np.testing.assert_allclose(site.post.mean_absolute[0], np.abs(np.tanh(x @ w)).mean(0), rtol=1e-12)


# What is compiled


def _spellings(network):
    """The same model, each time by another object."""
    module, variables = network.module, network.variables
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=optax.sgd(0.1))
    return {
        "apply": lambda: (variables, module.apply),
        "equal module": lambda: (variables, Square().apply),
        "state": lambda: ({"params": state.params}, state.replace(step=1).apply_fn),
        "changed arrays": lambda: (jax.tree.map(jnp.negative, variables), module.apply),
        "lambda": lambda: (variables, lambda v, x: Square().apply(v, x)),
        "jitted": lambda: (variables, jax.jit(Square().apply)),
    }


@pytest.mark.parametrize("name", ["apply", "equal module", "state", "changed arrays", "jitted"])
def test_equal_models_compile_once(name, square, report, compilations):
    arguments = _spellings(square)[name]()
    with compilations() as compiled:
        jax.block_until_ready(jaxeff.analyze(*arguments, square.batch))
    assert compiled.count == 0


def test_a_fresh_lambda_does_not_compile_again(square, compilations):
    spell = _spellings(square)["lambda"]
    jaxeff.analyze(*spell(), square.batch, criterion="magnitude")
    with compilations() as compiled:
        jax.block_until_ready(jaxeff.analyze(*spell(), square.batch, criterion="magnitude"))
    assert compiled.count == 0


def test_keyword_arrays_may_change_without_compiling(compilations):
    network = NETWORKS["dropout"]()
    collect = lambda seed: jaxeff.collect(  # noqa: E731
        *network.arguments, train=True, rngs={"dropout": jax.random.key(seed)}
    )
    keys = [jax.random.key(seed) for seed in range(2)]
    jax.block_until_ready((collect(0), keys))
    with compilations() as compiled:
        jax.block_until_ready(collect(1))
    assert compiled.count == 0


def test_lambdas_that_close_over_different_arrays_share_a_program_and_not_their_results(compilations):
    w, x = {"w": normal(3, 3)}, normal(5, 3)

    def mean(offset):
        (site,) = jaxeff.collect(w, lambda params, x: jnp.tanh(x @ params["w"] + offset), x).sites
        return np.asarray(site.post.mean_absolute)[0]

    offsets = [jnp.full((5, 3), value) for value in (0.0, 2.0)]
    first = mean(offsets[0])
    with compilations() as compiled:
        second = mean(offsets[1])
    assert compiled.count == 0
    np.testing.assert_allclose(first, np.abs(np.tanh(x @ w["w"])).mean(0), rtol=1e-5)
    np.testing.assert_allclose(second, np.abs(np.tanh(x @ w["w"] + 2)).mean(0), rtol=1e-5)


def test_inner_jits_that_close_over_different_arrays_do_not_share_their_results():
    w, x = {"w": normal(3, 3)}, normal(5, 3)

    def mean(scale):
        inner = jax.jit(lambda y: y * scale)
        (site,) = jaxeff.collect(w, lambda params, x: jnp.tanh(inner(x @ params["w"])), x).sites
        return np.asarray(site.post.mean_absolute)[0]

    for value in (1.0, 3.0):
        expected = np.abs(np.tanh(value * (x @ w["w"]))).mean(0)
        np.testing.assert_allclose(mean(jnp.full(3, value)[None]), expected, rtol=1e-5)


def test_functions_that_differ_in_a_number_do_not_share_their_results():
    w, x = {"w": normal(3, 3)}, normal(5, 3)
    for value in (1.0, 3.0):
        (site,) = jaxeff.collect(w, lambda params, x, v=value: jnp.tanh(v * (x @ params["w"])), x).sites
        expected = np.abs(np.tanh(value * (x @ w["w"]))).mean(0)
        np.testing.assert_allclose(site.post.mean_absolute[0], expected, rtol=1e-5)


def test_a_report_inside_jit_equals_the_one_outside(square, report):
    inside = jax.jit(lambda variables, x: jaxeff.analyze(variables, square.module.apply, x))
    _assert_equal(inside(square.variables, *square.batch), report)


def test_vmap_over_an_ensemble_equals_a_loop(square):
    ensemble = [square.variables, jax.tree.map(lambda leaf: 0.5 * leaf + 0.1, square.variables)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    analyze = lambda variables: jaxeff.analyze(variables, square.module.apply, square.batch)  # noqa: E731
    together = jax.vmap(analyze)(stacked)
    for index, member in enumerate(ensemble):
        # Batched matrix products sum in another order.
        _assert_equal(jax.tree.map(lambda leaf, i=index: leaf[i], together), analyze(member), rtol=1e-5)


def test_scan_over_training_gives_a_history(square, report):
    (x,) = square.batch

    def step(params, _):
        report = jaxeff.analyze({"params": params}, square.module.apply, x)
        gradient = jax.grad(lambda p: jnp.mean(jnp.square(square.module.apply({"params": p}, x))))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), report

    last, history = jax.lax.scan(step, square.variables["params"], length=3)
    _assert_equal(jax.tree.map(lambda leaf: leaf[0], history), report)
    after = jaxeff.analyze({"params": step(last, None)[0]}, square.module.apply, x)
    assert history.model.utilization.shape == (3,)
    moved = np.diff([*history.model.pooled_utilization, after.model.pooled_utilization])
    assert np.all(moved != 0)


def test_gradients_reach_the_weights_through_a_report(square):
    def utilization(variables):
        return jaxeff.analyze(variables, *square.arguments[1:], criterion=_activation).model.utilization

    gradient = jax.grad(utilization)(square.variables)["params"]["layer1"]["kernel"]
    steepest = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
    step = 1e-2
    below, above = (
        utilization(_with(square.variables, "layer1", lambda w, h=h: w.at[steepest].add(h)))
        for h in (-step, step)
    )
    # Central differences of a float32 function: curvature step^2, rounding 1e-7 / step.
    assert float(gradient[steepest]) == pytest.approx(float(above - below) / (2 * step), rel=1e-2)


# What is said of bad input


def _dense(w=(8, 4)):
    return {"params": {"kernel": np.ones(w, np.float32), "bias": np.zeros(w[-1], np.float32)}}


X = np.ones((5, 8), np.float32)
apply = nn.Dense(4).apply
DROPOUT = nn.Dropout(0.5, deterministic=False)
STATE = TrainState.create(apply_fn=apply, params=_dense()["params"], tx=optax.sgd(0.1))


def _other_statistics():
    return jaxeff.collect(_dense((8, 3)), nn.Dense(3).apply, X)


# name -> arguments, the exception, the argument it names, and what else it says.
BAD = {
    "empty params": (({}, apply, X), {}, ValueError, "params", "no arrays"),
    "empty collection": (({"params": {}}, apply, X), {}, ValueError, "params", "no arrays"),
    "no params": ((None, apply, X), {}, ValueError, "params", "None"),
    "params of another model": ((_dense((3, 4)), apply, X), {}, ValueError, "params", r"\(5, 8\)"),
    "params of other names": (({"params": {"w": X}}, apply, X), {}, ValueError, "params", "kernel"),
    "a train state": ((STATE, apply, X), {}, TypeError, "params", "TrainState"),
    "a string leaf": (({"params": {"kernel": "w"}}, apply, X), {}, TypeError, "params", "str"),
    "an object leaf": (({"w": np.array([None, {}])}, apply, X), {}, TypeError, "params", "'w'"),
    "a narrow batch": ((_dense(), apply, np.ones((5, 3), np.float32)), {}, ValueError, "batch", r"\(5, 3\)"),
    "an empty batch": ((_dense(), apply, np.ones((0, 8), np.float32)), {}, ValueError, "batch", "empty"),
    "no arrays in the batch": ((_dense(), apply, ()), {}, ValueError, "batch", "no arrays"),
    "text": ((_dense(), apply, ["a", "b"]), {}, TypeError, "batch", "str"),
    "an array of text": ((_dense(), apply, np.array(["a"])), {}, TypeError, "batch", "ndarray"),
    "batch forgotten": ((_dense(), apply), {}, ValueError, "batch", "missing"),
    "apply_fn forgotten": ((_dense(), None, X), {}, ValueError, "apply_fn", "missing"),
    "apply_fn is a number": ((_dense(), 3, X), {}, TypeError, "apply_fn", "int"),
    "apply_fn is the module": ((_dense(), nn.Dense(4), X), {}, TypeError, "apply_fn", "apply"),
    "an unknown criterion": ((_dense(), apply, X), {"criterion": "wnada"}, ValueError, "criterion", "wnada"),
    "criterion is a number": ((_dense(), apply, X), {"criterion": 3}, ValueError, "criterion", "3"),
    "a criterion of another shape": (
        (_dense(), apply, X),
        {"criterion": lambda weight, site: weight.sum()},
        ValueError,
        "criterion",
        "shape",
    ),
    "statistics twice": (
        (_dense(), apply, X),
        {"statistics": _other_statistics},
        ValueError,
        "statistics",
        "both",
    ),
    "statistics of another model": (
        (_dense(),),
        {"statistics": _other_statistics},
        ValueError,
        "statistics",
        r"\(3,\)",
    ),
    "a dropout without rngs": (({"w": X}, DROPOUT.apply, X), {}, ValueError, "rngs", "InvalidRngError"),
    "an unknown keyword": ((_dense(), apply, X), {"trian": True}, ValueError, "apply_fn", "trian"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "keywords", "error", "argument", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_named(arguments, keywords, error, argument, said):
    keywords = {k: v() if k == "statistics" else v for k, v in keywords.items()}
    with pytest.raises(error, match=said) as raised:
        jaxeff.analyze(*arguments, **keywords)
    # ValueError and TypeError themselves: a KeyError or one of Flax's own would be an accident.
    assert type(raised.value) is error and f"`{argument}`" in str(raised.value)


# What is said of numerical trouble

# name -> what becomes of the middle kernel, and a part of what its note says then.
TROUBLE = {
    "nan": (lambda w: w.at[0, 0].set(jnp.nan), "1 weights are nan or infinite"),
    "infinity": (lambda w: w.at[:2, 0].set(jnp.inf), "2 weights are nan or infinite"),
    "zero": (lambda w: 0 * w, "all weights are 0"),
    "1e37": (lambda w: 1e37 * w, "beyond float32"),
}


@pytest.mark.parametrize(("change", "note"), TROUBLE.values(), ids=TROUBLE)
def test_a_layer_in_numerical_trouble_is_named_and_harms_no_other(change, note, square):
    report = jaxeff.analyze(_with(square.variables, "layer1", change), *square.arguments[1:])
    assert note in report[LAYERS[1]].note
    assert _finite(report[LAYERS[0]]) and report[LAYERS[0]].note == ""
    assert _finite(report[LAYERS[2]])
    assert all(np.isfinite(float(number)) for number in jax.tree.leaves(report.model))
    printed = str(report)
    for path, layer in report.layers.items():
        assert (f"- {path}: " in printed) == (layer.note != "")


def test_faint_weights_are_measured_as_their_multiples_or_the_note_says_so(square):
    faint = jaxeff.analyze(_with(square.variables, "layer1", lambda w: 1e-36 * w), *square.arguments[1:])
    kernel = square.variables["params"]["layer1"]["kernel"]
    # The units emit their bias alone, so that the scores are 1e-36 times these.
    bias = np.maximum(square.variables["params"]["layer1"]["bias"], 0)
    expected = reference.metrics(np.abs(kernel) * bias)
    layer = faint[LAYERS[1]]
    exact = float(layer.metrics.utilization) == pytest.approx(expected["utilization"], rel=1e-4)
    assert exact or f"- {LAYERS[1]}: " in str(faint)
    assert all(_finite(other) for other in faint.layers.values())


def test_a_model_of_nothing_but_trouble_is_a_report_too(square):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, square.variables)
    report = jaxeff.analyze(broken, *square.arguments[1:])
    assert int(report.model.excluded) == 3
    assert "3 of 3 layers are not finite" in str(report)
    assert str(report).count("64 weights are nan or infinite") == 3
    assert "layer0/bias: 8 elements are nan or infinite" in str(report)


def test_nan_in_the_batch_leaves_magnitudes_and_says_so(square):
    x = np.array(square.batch[0])
    x[3, 2] = np.nan
    report = jaxeff.analyze(square.variables, square.module.apply, x)
    magnitudes = jaxeff.analyze(square.variables)
    for path, layer in report.layers.items():
        assert layer.side == "magnitude" and "are nan or infinite" in layer.note
        _assert_equal(layer.metrics, magnitudes[path].metrics)
        assert f"{path}: {layer.note}" in " ".join(str(report).split())


def test_units_that_never_emit_are_counted_and_named(square):
    bias = jnp.where(jnp.arange(8) < 3, -1e3, square.variables["params"]["layer0"]["bias"])
    params = {**square.variables["params"], "layer0": {**square.variables["params"]["layer0"], "bias": bias}}
    report = jaxeff.analyze({"params": params}, *square.arguments[1:])
    activity = report[LAYERS[0]].activity
    assert int(activity.dead) == 3
    assert activity.zero_fraction[:3].tolist() == [1, 1, 1] and float(activity.count) == 16
    advice = {found.path: found.evidence for found in report.recommendations() if found.rule == "dead units"}
    assert advice[LAYERS[0]]["dead_units"] == 3


def test_a_model_in_bfloat16_is_measured_in_float32():
    module = nn.Dense(6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = normal(16, 5)
    variables = drawn(module, x)
    layer = jaxeff.analyze(variables, module.apply, x, criterion=_activation)["kernel"]
    emitted = np.asarray(jax.jit(module.apply)(variables, x), np.float64)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    expected = reference.metrics(np.abs(kernel) * np.abs(emitted).mean(0))
    # XLA may keep more than bfloat16's 8 bits between fused operations: 2^-9 an activation.
    assert float(layer.metrics.utilization) == pytest.approx(expected["utilization"], rel=1e-3)
    assert layer.metrics.utilization.dtype == jnp.float32 and layer.note == ""


def test_one_weight_alone_uses_all_of_itself():
    w, x = np.full((1, 1), 2.0, np.float32), np.ones((3, 1), np.float32)
    report = jaxeff.analyze({"w": w}, lambda params, x: x @ params["w"], x)
    layer = report["w"]
    assert [float(layer.metrics.utilization), float(layer.metrics.gini)] == [1, 0]
    assert [float(layer.effective_units), float(layer.effective_fan_in)] == [1, 1]
    assert "w " in str(report) and layer.note == ""


def test_integer_leaves_are_counted_beside_the_weights():
    network = NETWORKS["mixed"]()
    report = jaxeff.analyze(*network.arguments, criterion=_activation)
    roles = {other.path: other.role for other in report.others}
    assert roles["chosen"] == "int32 array" and list(report.unpaired) == ["forgotten"]
    assert report.model.total_params == 30 + 5 + 3 + 1 + 12 + 3
    assert _finite(report["head/kernel"]) and _finite(report["forgotten"])


def test_a_model_without_weights_is_a_report_too():
    report = jaxeff.analyze({"scale": jnp.ones(3)}, lambda params, x: x * params["scale"][None], normal(4, 3))
    assert report.layers == {} and report.model.total_params == 3
    assert "No weights" in str(report)


def _quantized(params, x):
    return jnp.tanh(x @ params["a"]["kernel"].astype(jnp.float32)) @ params["b"]["kernel"].astype(jnp.float32)


def _squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


QUANTIZED = {name: {"kernel": np.full((4, 4), 3, np.int8)} for name in "ab"}
MODEL = (QUANTIZED, _quantized, normal(5, 4))
LOSS = {"targets": normal(5, 4), "loss_fn": _squared}
# What a tree of quantized weights is told: a report's text, or an error.
TOLD = {
    "analyze": lambda: str(jaxeff.analyze(QUANTIZED)),
    "analyze a model": lambda: str(jaxeff.analyze(*MODEL)),
    "a page": lambda: page.render(jaxeff.analyze(QUANTIZED)),
    "a notebook": lambda: jaxeff.analyze(QUANTIZED)._repr_html_(),
    "masks": lambda: prune.masks(prune.scored(QUANTIZED), 0.5),
    "sensitivity": lambda: prune.sensitivity(*MODEL, **LOSS, sparsities=(0.5,)),
    "compare_criteria": lambda: jaxeff.compare_criteria(*MODEL, **LOSS),
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_quantized_weights_are_named_and_what_to_pass_instead(told, request):
    try:
        said = told()
    except ValueError as error:
        said = str(error)
    said = " ".join(said.split())
    assert "`.astype(jnp.float32)`, times their scale" in said and "whole numbers" in said
    if "masks" not in request.node.name:
        assert "2 arrays hold whole numbers: a/kernel (int8), b/kernel (int8)." in said


def test_a_report_says_why_the_macs_of_a_while_are_unknown():
    def run(params, tokens):
        def step(carry):
            return carry[0] + 1, carry[1] @ params["inside"] + params["rows"][tokens]

        start = (0, params["rows"][tokens])
        return jax.lax.while_loop(lambda carry: carry[0] < 3, step, start)[1] @ params["after"]

    params = {"rows": normal(9, 8), "inside": normal(8, 8), "after": normal(8, 3)}
    report = jaxeff.analyze(params, run, jnp.arange(5))
    # Rows that are looked up have none however often.
    assert {path: row.macs for path, row in report.layers.items()} == {"rows": 0, "inside": None, "after": 24}
    notes = {path: row.note for path, row in report.layers.items() if row.note}
    assert list(notes) == ["inside"] and "MACs are unknown: it is used inside a while loop" in notes["inside"]
    assert notes["inside"] in " ".join(str(report).split())
    assert jaxeff.Report.from_json(report.to_json())["inside"].note == notes["inside"]


def test_layers_of_several_dtypes_and_sizes_stand_in_one_report(x64):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"large": (300, 300), "small": (20, 30)}
    params = {
        f"{name} {dtype.__name__}": jnp.asarray(draw(shape), dtype)
        for name, shape in shapes.items()
        for dtype in (np.float16, np.float32, np.float64)
    }
    report = jaxeff.analyze(params)
    for path, weight in params.items():
        expected = reference.metrics(np.abs(np.asarray(weight, np.float64)))
        assert float(report[path].metrics.gini) == pytest.approx(expected["gini"], rel=2e-6), path


def test_float64_inputs_of_a_float32_model(x64):
    params = {"a": np.ones((3, 4), np.float32), "b": np.ones((5, 4), np.float32)}
    report = jaxeff.analyze(
        params, lambda p, x, y: x @ p["a"] + y @ p["b"], (np.ones((2, 3)), np.ones((2, 5)))
    )
    assert float(report.model.utilization) == 1


@pytest.mark.parametrize("size", [3e38, 1e-37])
def test_units_of_the_largest_and_smallest_weights_count(size):
    assert float(jaxeff.analyze({"w": jnp.full((3, 4), size)})["w"].effective_units) == 4


def test_numbers_and_arrays_of_numpy_are_taken_as_jax_takes_them():
    weight = np.random.default_rng(0).standard_normal((300, 200))
    report = jaxeff.analyze({"w": weight, "temperature": 0.5, "steps": 3})
    alone = jaxeff.analyze({"w": jnp.asarray(weight, jnp.float32)})
    assert float(report["w"].metrics.gini) == float(alone["w"].metrics.gini)
    means = {other.path: float(other.mean_absolute) for other in report.others}
    assert means == {"temperature": 0.5, "steps": 3}


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_complex_leaves_are_counted_by_their_absolute_values(of):
    """Eigenvalues of a diagonal state space."""
    params = {"w": np.ones((4, 3), np.float32), "eigenvalues": of(np.array([3 + 4j, 0, 1j], np.complex64))}
    apply_fn = lambda p, x: (x @ p["w"] * p["eigenvalues"][None]).real  # noqa: E731
    for report in (
        jaxeff.analyze(params, apply_fn, np.ones((5, 4), np.float32)),
        jax.jit(lambda p: jaxeff.analyze(p))(params),
    ):
        (other,) = report.others
        assert other.role == "complex64 array" and other.zeros == 1 and other.nonfinite == 0
        found = [float(each) for each in (other.mean_absolute, other.rms, other.maximum)]
        np.testing.assert_allclose(found, [2, math.sqrt(26 / 3), 5], rtol=1e-6)
