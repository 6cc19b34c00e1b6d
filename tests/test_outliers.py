"""`jaxeff.outliers` against NumPy: ranges of inputs and errors of rounding, in every layout, and what has no number."""

import functools
from pathlib import Path

import devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from networks import drawn, normal

import jaxeff
from jaxeff import demo
from jaxeff.quantization import _weights


def _rounded(x, name, axis=None):
    """Round each of what shares a scale, which is all of x without the axes along which scales differ."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=axis, keepdims=True) / {"int8": 127, "fp8": 448}[name]
    y = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    return scale * (np.rint(y) if name == "int8" else y.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))


def _error(x, name, axis=None):
    return np.linalg.norm(x - _rounded(x, name, axis)) / np.linalg.norm(np.asarray(x, np.float64))


def _assert_inputs(found, inputs, rtol=1e-5):
    """Inputs: all that a layer took in, with its channels along the last axis."""
    a = np.asarray(inputs, np.float64)
    sizes = np.abs(a)
    assert found.largest == pytest.approx(sizes.max(), rel=rtol)
    median = np.median(sizes[sizes > 0])
    assert median * (1 - 2**-8.9) < found.median <= median * (1 + rtol)
    assert found.kurtosis == pytest.approx((a**4).mean() / (a**2).mean() ** 2, rel=rtol)
    assert found.zeros == pytest.approx((a == 0).mean(), abs=1e-12)
    channels = sizes.reshape(-1, a.shape[-1]).max(axis=0)
    np.testing.assert_allclose(found.channels, channels, rtol)
    (top, ratio), *_ = found.outlier_channels()
    assert np.ravel_multi_index(top, found.shape) == channels.argmax()
    assert ratio == pytest.approx(found.ratio) == found.largest / found.median
    for threshold in (0.0, 0.25, 1.0, 3.0, float("inf")):
        below = ((sizes < threshold) | (sizes == 0)).mean()
        assert found.below(threshold) == pytest.approx(below, abs=1e-12), threshold
    for fraction in (0.0, 0.25, 0.5, 0.9, 1.0):
        threshold = found.threshold(fraction)
        assert found.below(threshold) >= fraction
        # One step lower, it would be too few.
        assert threshold == 0 or ((sizes < threshold * (1 - 2**-8)) | (sizes == 0)).mean() < fraction


def _assert_weight(found, weight, units, rtol=1e-4):
    others = tuple(axis for axis in range(np.ndim(weight)) if axis not in units)
    for name in ("int8", "fp8"):
        assert getattr(found, name) == pytest.approx(_error(weight, name), rel=rtol), name
        assert getattr(found, f"{name}_by_unit") == pytest.approx(_error(weight, name, others), rel=rtol), (
            name
        )


def _heavy(*shape, seed=0):
    """Normal numbers with outliers in one channel and zeros."""
    x = normal(*shape, seed=seed)
    x[..., 1] *= 20
    return np.where(np.random.default_rng(seed).random(shape) < 0.2, 0, x).astype(np.float32)


def test_a_layer_by_hand():
    x, weight = _heavy(64, 6), normal(6, 5, seed=1)
    (row,) = jaxeff.outliers({"w": weight}, lambda p, x: jnp.tanh(x @ p["w"]), x)
    assert (row.path, row.kind, row.shape, row.nonlinearity, row.reasons) == (
        "w",
        "dense",
        (6, 5),
        "tanh",
        (),
    )
    _assert_inputs(row.inputs, x)
    assert row.inputs.int8 == pytest.approx(_error(x, "int8"), rel=1e-4)
    assert row.inputs.fp8 == pytest.approx(_error(x, "fp8"), rel=1e-4)
    _assert_weight(row.weight, weight, (1,))


def test_known_distributions():
    x = np.random.default_rng(0).standard_normal((4096, 32), np.float32)
    found = jaxeff.outliers({"w": normal(32, 3)}, lambda p, x: x @ p["w"], x)["w"].inputs
    assert found.kurtosis == pytest.approx(3, abs=0.05) and found.median == pytest.approx(0.6745, abs=0.01)
    assert found.threshold(0.6827) == pytest.approx(1, abs=0.02)
    uniform = np.random.default_rng(0).uniform(-1, 1, (4096, 32)).astype(np.float32)
    found = jaxeff.outliers({"w": normal(32, 3)}, lambda p, x: x @ p["w"], uniform)["w"].inputs
    # A uniform error within a step of 1 / 127, of numbers whose mean square is 1 / 3.
    assert found.kurtosis == pytest.approx(1.8, abs=0.01) and found.int8 == pytest.approx(0.5 / 127, rel=0.01)


class Layouts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(9, 6, name="embed")(x)
        y = nn.relu(nn.DenseGeneral((2, 4), name="heads")(x))
        y = nn.tanh(nn.DenseGeneral(6, axis=(-2, -1), name="out")(y))
        y = nn.relu(nn.Conv(4, (3,), name="conv")(x + y))
        return nn.Dense(3, name="last")(nn.relu(nn.Conv(8, (3,), feature_group_count=2, name="grouped")(y)))


def test_layers_of_every_layout():
    tokens = np.arange(14).reshape(2, 7) % 9
    variables = drawn(Layouts(), tokens)
    found = jaxeff.outliers(variables, Layouts().apply, tokens)
    _, seen = Layouts().apply(variables, tokens, capture_intermediates=True)
    outputs = {
        name: np.asarray(each["__call__"][0])
        for name, each in seen["intermediates"].items()
        if name != "__call__"
    }
    relu = lambda name: np.maximum(outputs[name], 0)  # noqa: E731
    _assert_inputs(found["heads/kernel"].inputs, outputs["embed"])
    _assert_inputs(found["out/kernel"].inputs, relu("heads").reshape(2, 7, 8))
    assert found["out/kernel"].inputs.shape == (2, 4)
    _assert_inputs(found["conv/kernel"].inputs, outputs["embed"] + np.tanh(outputs["out"]))
    _assert_inputs(found["grouped/kernel"].inputs, relu("conv"))
    _assert_inputs(found["last/kernel"].inputs, relu("grouped"))
    units = {"heads": (1, 2), "out": (2,), "conv": (2,), "grouped": (2,), "last": (1,)}
    for name, axes in units.items():
        _assert_weight(found[f"{name}/kernel"].weight, variables["params"][name]["kernel"], axes)
    embedding = found["embed/embedding"]
    assert embedding.inputs is None and "looked up" in embedding.reasons[0]
    _assert_weight(embedding.weight, variables["params"]["embed"]["embedding"], (1,))
    assert "embed/embedding: its rows are looked up" in str(found)


def test_a_weight_that_lies_outputs_first():
    x, weight = normal(8, 5), normal(3, 5, seed=1)
    row = jaxeff.outliers({"w": weight}, lambda p, x: x @ p["w"].T, x)["w"]
    _assert_inputs(row.inputs, x)
    _assert_weight(row.weight, weight, (0,))


@pytest.mark.parametrize("axis", [0, 1])
def test_each_stacked_block_has_its_own_row_and_the_table_folds_them(axis):
    kernels, x = normal(24, 4, 4, seed=1), normal(6, 4)

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(params["w"], axis, 0))[0]

    found = jaxeff.outliers({"w": np.moveaxis(kernels, 0, axis)}, model, x)
    assert [row.path for row in found] == [f"w[{index}]" for index in range(24)]
    inputs = x
    for row, kernel in zip(found, kernels, strict=True):
        _assert_inputs(row.inputs, inputs, rtol=1e-4)
        _assert_weight(row.weight, kernel, (1,))
        inputs = np.tanh(inputs @ kernel)
    assert len([line for line in str(found).splitlines() if line.startswith("w[")]) == 1
    assert len([line for line in found.table(blocks=True).splitlines() if line.startswith("w[")]) == 24


def test_time_is_one_layer_with_a_scale_for_each_step():
    kernel, x = normal(4, 4, seed=1), normal(3, 5, 4)

    def model(params, x):
        def step(h, now):
            return jnp.tanh((h + now) @ params["w"]), None

        return jax.lax.scan(step, jnp.zeros((3, 4)), jnp.swapaxes(x, 0, 1))[0]

    h, inputs = np.zeros((3, 4)), []
    for now in np.swapaxes(x, 0, 1):
        inputs.append(h + now)
        h = np.tanh(inputs[-1] @ kernel)
    found = jaxeff.outliers({"w": kernel}, model, x)["w"].inputs
    _assert_inputs(found, np.stack(inputs), rtol=1e-4)
    off = np.stack([each - _rounded(each, "int8") for each in inputs])
    assert found.int8 == pytest.approx(np.linalg.norm(off) / np.linalg.norm(inputs), rel=1e-3)


def test_batches_and_uses_add():
    x, weight = _heavy(10, 4), normal(4, 4, seed=1)
    params, parts = {"w": weight}, (x[:3] / 50, x[3:])

    def model(params, x):
        return x @ params["w"]

    collected = [jaxeff.collect(params, model, part, ranges=True) for part in parts]
    found = jaxeff.outliers(params, statistics=jaxeff.merge(*collected))["w"].inputs
    _assert_inputs(found, np.concatenate(parts))
    off = np.concatenate([part - _rounded(part, "int8") for part in parts])
    assert found.int8 == pytest.approx(np.linalg.norm(off) / np.linalg.norm(np.concatenate(parts)), rel=1e-4)
    x = x / 20  # far from where tanh rounds to 1
    twice = jaxeff.outliers(params, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], x)["w"].inputs
    _assert_inputs(twice, np.concatenate([x, np.tanh(x @ weight)]), rtol=1e-4)


@pytest.mark.filterwarnings("default:the scores of")
def test_batches_calibrated_are_one_batch():
    x, params = np.asarray(_heavy(9, 4)), {"w": normal(4, 4, seed=1)}
    largest = x[np.argmax(np.abs(x).max(1))][None]
    # Each batch is rounded with a scale of its own, so each holds the largest input.
    batches = [np.concatenate([part, largest]) for part in (x[:2], x[2:5], x[5:])]

    def model(params, x):
        return x @ params["w"]

    (found,) = jaxeff.calibrate(params, model, batches, ranges=True, progress=False).sites
    (expected,) = jaxeff.collect(params, model, np.concatenate(batches), ranges=True).sites
    for name in ("counts", "channels"):
        np.testing.assert_array_equal(getattr(found.ranges, name), getattr(expected.ranges, name))
    for name in ("square", "fourth", "int8", "fp8"):
        np.testing.assert_allclose(getattr(found.ranges, name), getattr(expected.ranges, name), rtol=1e-5)
    for name in ("absolute_sum", "maximum"):
        np.testing.assert_allclose(getattr(found.input, name), getattr(expected.input, name), rtol=1e-5)


@pytest.mark.filterwarnings("default:the scores of")
def test_ranges_calibrated_are_those_merged_whatever_the_sizes_of_batches():
    x, params = np.asarray(_heavy(9, 4)), {"w": normal(4, 4, seed=1), "v": normal(4, 2, seed=2)}
    batches = [x[:3] / 50, x[3:6], 0 * x[6:], x[6:] / 7]

    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    found = jaxeff.calibrate(params, model, batches, ranges=True, progress=False)
    collected = (jaxeff.collect(params, model, batch, ranges=True) for batch in batches)
    expected = functools.reduce(jaxeff.merge, collected)
    for one, other in zip(found.sites, expected.sites, strict=True):
        for field in ("counts", "channels", "square", "fourth", "int8", "fp8"):
            np.testing.assert_allclose(getattr(one.ranges, field), getattr(other.ranges, field), rtol=1e-6)


def test_counts_stop_and_say_so():
    params, x = {"w": normal(4, 3)}, normal(10, 4)
    statistics = jaxeff.collect(params, lambda p, x: x @ p["w"], x, ranges=True)
    for _ in range(32):
        statistics = jaxeff.merge(statistics, statistics)
    row = jaxeff.outliers(params, statistics=statistics)["w"]
    assert row.inputs is None and "take fewer batches" in row.reasons[0]


def test_what_does_not_count_is_left_out():
    x, keep = _heavy(6, 5, 4), np.arange(30).reshape(6, 5) % 3 > 0
    found = jaxeff.outliers({"w": normal(4, 3)}, lambda p, x: x @ p["w"], x, where=keep)["w"].inputs
    _assert_inputs(found, x[keep])


def test_bfloat16_is_exact():
    x = jnp.asarray(_heavy(63, 4), jnp.bfloat16)
    weight = jnp.asarray(normal(4, 3, seed=1), jnp.bfloat16)
    row = jaxeff.outliers({"w": weight}, lambda p, x: x @ p["w"], x)["w"]
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    _assert_inputs(row.inputs, x)
    sizes = np.abs(x[x != 0])
    assert row.inputs.median == np.median(sizes) and row.dtype == "bfloat16"
    _assert_weight(row.weight, weight, (1,))


def test_nnx():
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 2, rngs=nnx.Rngs(1)))
    params, apply_fn = jaxeff.functional(model)
    x = normal(16, 5)
    found = jaxeff.outliers(params, apply_fn, x)
    _assert_inputs(found["layers/0/kernel"].inputs, x)
    _assert_inputs(found["layers/2/kernel"].inputs, np.asarray(nnx.relu(model.layers[0](x))))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_numbers_of_any_size(scale):
    """Squares and fourth powers of these overflow or vanish in float32."""
    x, weight = _heavy(16, 4) * np.float32(scale), normal(4, 3, seed=1) * np.float32(scale)
    row = jaxeff.outliers({"w": weight}, lambda p, x: x @ (p["w"] / scale), x)["w"]
    powers = [(x.astype(np.float64) ** power).mean() for power in (2, 4)]
    assert row.inputs.kurtosis == pytest.approx(powers[1] / powers[0] ** 2)
    assert row.weight.int8 == pytest.approx(_error(weight, "int8"), rel=1e-4)


def test_one_column_one_row_and_a_vector():
    column, row = normal(4, 1), normal(1, 4)
    found = jaxeff.outliers({"w": column}, lambda p, x: x @ p["w"], normal(8, 4))["w"].weight
    assert found.int8 == found.int8_by_unit and found.fp8 == found.fp8_by_unit
    found = jaxeff.outliers({"w": row}, lambda p, x: x @ p["w"], normal(8, 1))["w"].weight
    # Each output has one weight, which is its own scale.
    assert found.int8_by_unit == found.fp8_by_unit == 0 and found.int8 > 0


def test_what_has_no_numbers_has_a_reason():
    def model(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    def reasons(x, **changed):
        found = jaxeff.outliers({"a": normal(4, 5), "b": normal(5, 2, seed=1)} | changed, model, x)
        return {row.path: (row.weight is None, row.inputs is None, row.reasons) for row in found}

    x = np.abs(normal(6, 4))
    dead = reasons(x, a=-np.ones((4, 5), np.float32))
    assert dead["b"] == (False, True, ("all of its inputs are 0",))
    assert reasons(x, a=np.zeros((4, 5), np.float32))["a"] == (True, False, ("all weights are 0",))
    broken = normal(4, 5)
    broken[0, 0], broken[1, 1] = np.nan, np.inf
    found = reasons(x, a=broken)
    assert found["a"] == (True, False, ("2 weights are nan or infinite",))
    assert found["b"][1] and "of its inputs are nan or infinite" in found["b"][2][0]
    masked = jaxeff.outliers({"w": normal(4, 3)}, lambda p, x: x @ p["w"], x, where=np.zeros(6, bool))["w"]
    assert masked.inputs is None and masked.reasons == ("none of its inputs counted",)
    joined = jaxeff.outliers(
        {"a": normal(2, 3), "b": normal(2, 3)}, lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), x
    )
    assert all(row.inputs is not None or row.reasons for row in joined)
    one_by_one = jaxeff.outliers({"w": normal(4, 4)}, lambda p, x: (x @ p["w"]) @ p["w"].T, x)["w"]
    assert one_by_one.inputs is None and "different inputs" in " ".join(one_by_one.reasons)
    assert one_by_one.weight.int8 > 0 and one_by_one.weight.int8_by_unit is None


def test_weights_alone():
    params = {"dense": {"kernel": normal(6, 5), "bias": normal(5)}, "table": normal(6, 3, 2, seed=1)}
    found = jaxeff.outliers(params)
    assert [row.path for row in found] == ["dense/kernel", "table"]
    _assert_weight(found["dense/kernel"].weight, params["dense"]["kernel"], (1,))
    assert found["table"].weight.int8 == pytest.approx(_error(params["table"], "int8"), rel=1e-4)
    assert found["table"].weight.int8_by_unit is None and "outputs is not known" in found["table"].reasons[0]
    with pytest.raises(KeyError, match="no layer 'dense/bias'; there are dense/kernel, table"):
        _ = found["dense/bias"]


def test_stacked_weights_alone():
    params = {"blocks": {"norm": normal(3, 4), "kernel": normal(3, 4, 5, seed=1)}}
    found = jaxeff.outliers(params)
    assert [row.path for row in found] == [f"blocks/kernel[{index}]" for index in range(3)]
    for row, kernel in zip(found, params["blocks"]["kernel"], strict=True):
        _assert_weight(row.weight, kernel, (1,))


def test_a_model_without_weights():
    assert (
        str(jaxeff.outliers({"scale": normal(4)}, lambda p, x: x * p["scale"][None], normal(3, 4)))
        == "No weights."
    )


def test_in_64_bits(x64):
    x, weight = _heavy(64, 6).astype(np.float64), normal(6, 5, seed=1).astype(np.float64)
    row = jaxeff.outliers({"w": weight}, lambda p, x: x @ p["w"], x)["w"]
    _assert_inputs(row.inputs, x, rtol=1e-6)
    _assert_weight(row.weight, weight, (1,), rtol=1e-9)


def test_large_weights_are_read_where_they_lie(monkeypatch):
    weight = jnp.asarray(normal(3, 6, 5, seed=1))
    there = jax.device_get(_weights._on_device(weight, (0,), (2,)))
    here = _weights._measured(np.asarray(weight), (0,), (2,))
    for ours, theirs in zip(there, here, strict=True):
        np.testing.assert_allclose(ours, theirs, 1e-5)
    monkeypatch.setattr(_weights, "_LARGE", 8)
    for found, kernel in zip(_weights.weight_errors(weight, (0,), (2,)), weight, strict=True):
        _assert_weight(found, kernel, (1,))


def test_bad_input():
    params, model, x = {"w": normal(4, 3)}, lambda p, x: x @ p["w"], normal(8, 4)
    with pytest.raises(ValueError, match="`batch` is missing"):
        jaxeff.outliers(params, model)
    statistics = jaxeff.collect(params, model, x)
    with pytest.raises(ValueError, match="hold no ranges"):
        jaxeff.outliers(params, statistics=statistics)
    with pytest.raises(ValueError, match="not both|`statistics`, or"):
        jaxeff.outliers(params, model, x, statistics=statistics)
    with pytest.raises(TypeError, match="got dict"):
        jaxeff.outliers(params, statistics={})
    with pytest.raises(ValueError, match="other `params`"):
        jaxeff.outliers({"w": normal(3, 3)}, statistics=statistics)
    found = jaxeff.outliers(params, model, x)["w"].inputs
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`threshold`"):
            found.below(threshold)
    with pytest.raises(ValueError, match="`fraction`"):
        found.threshold(1.1)
    with pytest.raises(ValueError, match="`ranges`"):
        jaxeff.merge(statistics, jaxeff.collect(params, model, x, ranges=True))


def test_an_outlier_channel_costs_the_inputs_int8_and_a_column_costs_the_weight():
    """Truths that the numbers exist for: a scale for each output repairs a large column, and fp8 bears outliers."""
    x, weight = normal(256, 16), normal(16, 8, seed=1)
    model = lambda p, x: x @ p["w"]  # noqa: E731
    plain = jaxeff.outliers({"w": weight}, model, x)["w"]
    x[:, 3] *= 100
    weight[:, 2] *= 100
    worse = jaxeff.outliers({"w": weight}, model, x)["w"]
    assert (
        worse.inputs.outlier_channels(1)[0][0] == (3,) and worse.inputs.kurtosis > 3 * plain.inputs.kurtosis
    )
    assert worse.inputs.ratio > 30 * plain.inputs.ratio
    np.testing.assert_allclose(worse.weight.int8_by_unit, plain.weight.int8_by_unit, rtol=0.5)


@pytest.mark.slow
def test_a_trained_network_moves_by_what_the_numbers_say():
    """Outputs move less than the weights, whose errors cancel over many inputs, and in proportion to them."""
    state, _ = demo.train(seed=0, epochs=10)
    _, test = demo.split(demo.digits())
    found = jaxeff.outliers(state.params, state.apply_fn, test.images)
    before = state.apply_fn({"params": state.params}, test.images)

    def moved(path, name):
        module, leaf = path.split("/")
        rounded = {**state.params[module], leaf: _rounded(state.params[module][leaf], name)}
        after = state.apply_fn({"params": {**state.params, module: rounded}}, test.images)
        return float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))

    for row in found:
        int8, fp8 = moved(row.path, "int8"), moved(row.path, "fp8")
        assert int8 < row.weight.int8 and fp8 < row.weight.fp8, row.path
        assert 0.5 < (fp8 / int8) / (row.weight.fp8 / row.weight.int8) < 2, row.path
    int8 = jax.tree.map(lambda leaf: _rounded(leaf, "int8") if leaf.ndim > 1 else leaf, state.params)
    rounded = state.replace(params=jax.tree.map(jnp.float32, int8))
    assert abs(demo.accuracy(rounded, test) - demo.accuracy(state, test)) < 0.01


def test_sharded_over_eight_devices():
    devices.run(Path(__file__).with_name("sharded_outliers.py"), 8)
