"""Metrics against float64 oracles, closed forms, and the laws a measure of concentration obeys."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import exact, metrics, sketch
from jaxeff.metrics import summarize

FIELDS = [field.name for field in dataclasses.fields(metrics.Metrics)]
COUNTS = ["zeros", "nonfinite", "size"]
SCALE_FREE = [
    *["entropy", "normalized_entropy", "effective_params", "utilization", "redundancy", "gini"],
    *["coverage_50", "coverage_80", "coverage_90", "relative_sparsity_1e2", "relative_sparsity_1e3"],
]
SMOOTH = SCALE_FREE[:6]
SLOPED = [*SMOOTH, "mean", "std", "max"]
# Each field by its own function, as a user would ask for it alone.
ALONE: dict[str, Callable] = {
    **{name: getattr(metrics, name) for name in SMOOTH},
    "coverage_50": lambda x: metrics.coverage(x, 0.5),
    "coverage_80": lambda x: metrics.coverage(x, 0.8),
    "coverage_90": lambda x: metrics.coverage(x, 0.9),
    "sparsity_1e2": lambda x: metrics.sparsity(x, 1e-2),
    "sparsity_1e3": lambda x: metrics.sparsity(x, 1e-3),
    "relative_sparsity_1e2": lambda x: metrics.relative_sparsity(x, 1e-2),
    "relative_sparsity_1e3": lambda x: metrics.relative_sparsity(x, 1e-3),
}
HALF_SUBNORMAL = 2.0**-150  # rounding of a result below the normal floats


def assert_close(got: metrics.Metrics, want: dict[str, float], rtol: float = 1e-6) -> None:
    """Relative to each expected value; an expected 0 is 0."""
    for name, expected in want.items():
        value = float(getattr(got, name))
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=HALF_SUBNORMAL, err_msg=name)


def vector_of(fields: list[str]) -> Callable[[jax.Array], jax.Array]:
    """The fields as one vector function, for its Jacobian."""
    return lambda x: jnp.stack([getattr(summarize(x), name) for name in fields])


def equal_but_one(n: int, common: float, other: float) -> np.ndarray:
    x = np.full(n, common, np.float32)
    x[n // 2] = other
    return x


def next_up(value: float) -> np.float32:
    return np.nextafter(np.float32(value), np.float32(np.inf))


def next_down(value: float) -> np.float32:
    return np.nextafter(np.float32(value), np.float32(0))


def normal(n: int, dtype=np.float32) -> np.ndarray:
    return np.abs(np.random.default_rng(n).standard_normal(n)).astype(dtype)


def uniform(n: int) -> np.ndarray:
    return np.random.default_rng(n).random(n)


def lognormal(n: int, sigma: float) -> np.ndarray:
    return np.exp(sigma * np.random.default_rng(n).standard_normal(n)).astype(np.float32)


ARRAYS: dict[str, Callable[[int], np.ndarray]] = {
    "uniform": lambda n: uniform(n).astype(np.float32),
    "normal": normal,
    "lognormal 1": partial(lognormal, sigma=1),
    "lognormal 2": partial(lognormal, sigma=2),
    "lognormal 4": partial(lognormal, sigma=4),
    "one-hot": lambda n: equal_but_one(n, 0, 3.7),
    "constant 0.1": lambda n: np.full(n, 0.1, np.float32),
    "constant 1/3": lambda n: np.full(n, 1 / 3, np.float32),
    "constant subnormal": lambda n: np.full(n, 1e-40, np.float32),
    "constant 3e38": lambda n: np.full(n, 3e38, np.float32),
    "one ulp more": lambda n: equal_but_one(n, 0.1, next_up(0.1)),
    "one ulp less": lambda n: equal_but_one(n, 1 / 3, next_down(1 / 3)),
    "one ulp below a power of 2": lambda n: equal_but_one(n, 1, next_down(1)),
    "one ulp above a power of 2": lambda n: equal_but_one(n, 1, next_up(1)),
    "half an ulp more": lambda n: np.where(np.arange(n) % 2, np.float32(0.1), next_up(0.1)),
    "one zero": lambda n: equal_but_one(n, 0.1, 0),
    "one holds half": lambda n: equal_but_one(n, 0.1, 0.1 * n),
    "one holds nearly all": lambda n: equal_but_one(n, 0.1, 1e12),
    "one holds all but 1e-30": lambda n: equal_but_one(n, 0.1, 1e30),
    "nearly constant": lambda n: (0.7 + 1e-4 * normal(n)).astype(np.float32),
    "ternary": lambda n: np.random.default_rng(n).integers(0, 3, n).astype(np.float32),
    "subnormal": lambda n: (1e-40 * uniform(n)).astype(np.float32),
    "about the smallest normal": lambda n: (3e-38 * uniform(n)).astype(np.float32),
    "about 1e30": lambda n: (1e30 * normal(n, np.float64)).astype(np.float32),
    "up to the largest": lambda n: (3.4e38 * uniform(n)).astype(np.float32),
    "bfloat16": partial(normal, dtype=jnp.bfloat16),
    "bfloat16 subnormal": lambda n: (1e-39 * uniform(n)).astype(jnp.bfloat16),
    "float16": partial(normal, dtype=jnp.float16),
    "float16 subnormal": lambda n: (1e-5 * uniform(n)).astype(jnp.float16),
    "float8_e4m3fn": partial(normal, dtype=jnp.float8_e4m3fn),
    "float8_e5m2": partial(normal, dtype=jnp.float8_e5m2),
    "int32": lambda n: np.random.default_rng(n).integers(0, 1000, n).astype(np.int32),
}
FLOAT32 = [name for name, make in ARRAYS.items() if make(2).dtype == np.float32]


# 8192 is the width of a row of sums.
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 8191, 8192, 8193])
@pytest.mark.parametrize("name", FLOAT32)
def test_metrics_agree_with_float64(name: str, size: int) -> None:
    x = ARRAYS[name](size)
    assert_close(summarize(x), reference.metrics(x))


@pytest.mark.parametrize("name", sorted(ARRAYS.keys() - FLOAT32))
def test_metrics_of_small_and_integer_dtypes_agree_with_float64(name: str) -> None:
    x = ARRAYS[name](1000)
    got = summarize(x)
    assert_close(got, reference.metrics(x))
    assert {getattr(got, field).dtype for field in FIELDS} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(
    "name", ["uniform", "lognormal 4", "one-hot", "constant 0.1", "one ulp less", "one holds half"]
)
def test_metrics_of_a_million_weights_agree_with_float64(name: str) -> None:
    x = ARRAYS[name](10**6)
    assert_close(summarize(x), reference.metrics(x))


@pytest.mark.parametrize("name", ["lognormal 4", "one ulp more"])
def test_metrics_of_ten_million_weights_agree_with_float64(name: str) -> None:
    x = ARRAYS[name](10**7)
    assert_close(exact.summarize(x), reference.metrics(x))


@pytest.mark.parametrize("field", ALONE)
def test_a_metric_alone_is_the_one_in_the_summary(field: str) -> None:
    for name in ("lognormal 2", "one-hot", "one ulp more", "subnormal"):
        x = ARRAYS[name](1000)
        want = float(getattr(summarize(x), field))
        np.testing.assert_allclose(float(ALONE[field](x)), want, rtol=1e-6, err_msg=name)


def test_the_reference_gini_is_the_definition() -> None:
    x = [0.5, 2.0, 0.0, 1.0, 1.0, 7.0]
    assert reference.gini(np.array(x)) == pytest.approx(float(reference.exact_gini(x)), rel=1e-15)


def test_float64_is_computed_in_float64(x64: None) -> None:
    even, uneven = normal(1000, np.float64), np.exp(3 * normal(1000, np.float64))
    for x in (even, uneven, 0.1 + 1e-9 * even, 1e-300 * even):
        got = summarize(x)
        assert_close(got, reference.metrics(x), rtol=1e-11)
        assert {got.entropy.dtype, got.gini.dtype, got.std.dtype} == {jnp.dtype("float64")}


def test_float64_keeps_what_float32_cannot_tell_apart(x64: None) -> None:
    x = np.full(1000, 0.1)
    x[3] += 1e-12
    d = (x - x.mean()) / x.mean()
    np.testing.assert_allclose(metrics.redundancy(x), np.mean(d * d) / 2 / math.log(1000), rtol=1e-3)
    assert metrics.redundancy(x.astype(np.float32)) == 0


def test_float32_stays_float32_with_x64_on(x64: None) -> None:
    x = normal(1000)
    got = summarize(x)
    assert_close(got, reference.metrics(x))
    assert got.entropy.dtype == jnp.float32 and got.zeros.dtype == jnp.int32


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_no_implicit_promotion(dtype) -> None:
    layer = jax.ShapeDtypeStruct((20_000,), dtype)  # promotion is decided in tracing
    for function in (summarize, *ALONE.values()):
        jax.eval_shape(function, layer)
    if dtype != jnp.int32:
        jax.eval_shape(jax.hessian(vector_of(SLOPED)), jax.ShapeDtypeStruct((7,), dtype))


# Closed forms.


def test_uniform_weights_have_utilization_half_root_e_and_gini_a_third() -> None:
    got = summarize((np.arange(10**6, dtype=np.float32) + 0.5) / 10**6)
    assert float(got.utilization) == pytest.approx(math.sqrt(math.e) / 2, rel=1e-5)
    assert float(got.gini) == pytest.approx(1 / 3, rel=1e-5)
    assert float(got.coverage_80) == pytest.approx(1 - math.sqrt(0.2), rel=1e-5)


def test_normal_weights_have_gini_root_2_less_1() -> None:
    quantile = NormalDist().inv_cdf
    x = np.array([quantile(0.5 + (i + 0.5) / 40_000) for i in range(20_000)], np.float32)
    assert float(metrics.gini(x)) == pytest.approx(math.sqrt(2) - 1, rel=1e-4)
    assert float(metrics.utilization(x)) == pytest.approx(0.7529, rel=1e-3)


@pytest.mark.parametrize(
    ("x", "share", "want"),
    [
        ([4, 3, 2, 1], 0.9, 0.75),
        ([4, 3, 2, 1], 1.0, 1.0),
        ([1, 1, 1, 1], 0.5, 0.5),
        ([1, 1, 1, 1], 0.51, 0.75),
        ([1, 0, 0, 0], 0.5, 0.25),
        ([1, 0, 0, 0], 1.0, 0.25),
        ([0.1] * 10, 0.8, 0.8),
    ],
)
def test_coverage_counts_the_weights_that_reach_the_share(x: list, share: float, want: float) -> None:
    assert float(metrics.coverage(jnp.array(x, jnp.float32), share)) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("n", [1000, 40_000_000])
def test_equal_weights_reach_a_share_at_exactly_that_fraction(n: int) -> None:
    # float32 cumulative sums stop at 2^24: 40 million ones once had 21 % of them hold half.
    x = np.full(n, 0.3, np.float32)
    assert float(metrics.coverage(x, 0.8)) == pytest.approx(0.8, rel=1e-7)


def test_a_numpy_share_is_the_same_share() -> None:
    x = np.full(10, 0.3, np.float32)
    assert metrics.coverage(x, np.float32(0.5)) == metrics.coverage(x, 0.5) == 0.5


def test_shares_other_than_the_usual_agree_with_float64() -> None:
    x = ARRAYS["lognormal 2"](1000)
    for share in (1e-9, 0.33, 1):
        assert float(metrics.coverage(x, share)) == pytest.approx(reference.coverage(x, share), rel=1e-6)


def test_sparsity_compares_in_exact_arithmetic() -> None:
    # float32(0.01) lies below 0.01, float32(0.001) above 0.001.
    assert metrics.sparsity(np.float32([0.01]), 0.01) == 1
    assert metrics.sparsity(np.float32([0.001]), 0.001) == 0
    assert metrics.sparsity(np.float32([0.5]), 0.5) == 0
    assert metrics.sparsity(np.float32([2**25]), 2**25 + 1) == 1


def test_sparsity_sees_subnormals() -> None:
    x = np.float32([0, 1e-45, 1e-40, 1])
    assert metrics.sparsity(x, 0) == 0
    assert metrics.sparsity(x, 1e-46) == 0.25
    assert metrics.sparsity(x, 1e-42) == 0.5
    assert metrics.sparsity(x, 1e-39) == 0.75
    assert metrics.sparsity(x, 1e300) == 1
    assert summarize(x).zeros == 1


def test_relative_sparsity_is_measured_against_the_mean() -> None:
    equal = np.full(1000, 0.1, np.float32)
    assert metrics.relative_sparsity(equal, 1) == 0
    assert metrics.relative_sparsity(equal, 1.0000001) == 1
    assert metrics.relative_sparsity(equal, 1e300) == 1
    assert metrics.relative_sparsity(jnp.zeros(3), 0.5) == 1
    x = ARRAYS["lognormal 2"](1000)
    for threshold in (0, 0.1, 0.5, 3):
        got = float(metrics.relative_sparsity(x, threshold))
        assert got == pytest.approx(reference.relative_sparsity(x, threshold), rel=1e-6)


# Degenerate and invalid layers.


@pytest.mark.parametrize("shape", [(4,), (3, 3), (1,), ()])
def test_an_all_zero_layer_is_dead_rather_than_even(shape: tuple[int, ...]) -> None:
    got = summarize(jnp.zeros(shape))
    nan = ["entropy", "normalized_entropy", "gini", "coverage_50", "coverage_80", "coverage_90"]
    assert all(jnp.isnan(getattr(got, name)) for name in nan)
    assert got.effective_params == got.utilization == 0
    assert got.redundancy == got.relative_sparsity_1e2 == got.relative_sparsity_1e3 == 1
    assert got.sparsity_1e2 == got.sparsity_1e3 == 1
    assert got.mean == got.std == got.max == got.nonfinite == 0
    assert got.zeros == got.size == math.prod(shape)


def test_a_single_weight_is_even() -> None:
    got = summarize(jnp.array(0.3))
    assert got.entropy == got.redundancy == got.gini == got.std == 0
    assert got.normalized_entropy == got.effective_params == got.utilization == got.coverage_50 == 1


@pytest.mark.parametrize("n", [2, 3, 1000, 8193])
def test_equal_weights_are_perfectly_even(n: int) -> None:
    got = summarize(np.full(n, 0.1, np.float32))
    assert got.utilization == got.normalized_entropy == 1
    assert got.redundancy == got.gini == got.std == 0
    assert got.mean == got.max == np.float32(0.1)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_an_invalid_importance_makes_every_metric_nan(bad: float) -> None:
    x = np.float32([1, 0, bad, 2, bad, -0.0])
    got = summarize(x)
    assert {name for name in FIELDS if jnp.isnan(getattr(got, name))} == set(FIELDS) - set(COUNTS)
    assert (got.zeros, got.nonfinite, got.size) == (2, 2, 6)


def test_an_invalid_importance_makes_a_metric_alone_nan() -> None:
    x = equal_but_one(1000, 1, math.nan)
    assert all(jnp.isnan(alone(x)) for alone in ALONE.values())


def test_negative_zero_is_zero() -> None:
    got = summarize(np.float32([-0.0, 1, 1]))
    assert (got.zeros, got.nonfinite) == (1, 0)
    assert_close(got, reference.metrics(np.array([0.0, 1, 1])))


@pytest.mark.parametrize("function", [summarize, sketch.sketch, sketch.summarize_array, *ALONE.values()])
def test_what_is_no_layer_is_refused(function: Callable) -> None:
    with pytest.raises(ValueError, match="`x` is empty"):
        function(jnp.zeros((0, 3)))
    for wrong in (jnp.ones(3, bool), jnp.ones(3, complex)):
        with pytest.raises(TypeError, match=f"`x` must hold real numbers.*{wrong.dtype}"):
            function(wrong)
    with pytest.raises(TypeError, match="`x` must be one array"):
        function([1.0, 2.0])


def test_shares_and_thresholds_out_of_range_are_refused() -> None:
    x = jnp.ones(3)
    for share in (0, -0.5, 1.1, math.nan, True, "half"):
        with pytest.raises(ValueError, match="`share`"):
            metrics.coverage(x, share)
    for threshold in (-1e-3, math.inf, math.nan, False, "low"):
        for function in (metrics.sparsity, metrics.relative_sparsity):
            with pytest.raises(ValueError, match="`threshold`"):
                function(x, threshold)


# Laws. Hurley and Rickard's names; weights are whole numbers, so that every change is exact.

LAYER = st.lists(st.integers(0, 50), min_size=6, max_size=6).filter(any).map(np.float32)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def values(x: np.ndarray, fields: list[str]) -> np.ndarray:
    got = summarize(x)
    return np.array([float(getattr(got, name)) for name in fields])


def assert_more_even(x: np.ndarray, than: np.ndarray) -> None:
    rising, falling = ["utilization", "normalized_entropy"], ["gini", "redundancy"]
    assert np.all(values(x, rising) > values(than, rising))
    assert np.all(values(x, falling) < values(than, falling))


@laws
@given(LAYER, st.permutations(range(6)))
def test_order_changes_nothing(x: np.ndarray, order: list[int]) -> None:
    fields = [name for name in FIELDS if name not in COUNTS]
    np.testing.assert_allclose(values(x[order], fields), values(x, fields), rtol=1e-6)


@laws
@given(LAYER, st.integers(-120, 120))
def test_a_power_of_two_changes_no_bit(x: np.ndarray, power: int) -> None:
    scaled = np.ldexp(x, power)
    np.testing.assert_array_equal(values(scaled, SCALE_FREE), values(x, SCALE_FREE))
    moments = ["mean", "std", "max"]
    np.testing.assert_allclose(values(scaled, moments), np.ldexp(values(x, moments), power), rtol=1e-6)


@laws
@given(LAYER, st.floats(1e-30, 1e30))
def test_scaling_changes_nothing(x: np.ndarray, factor: float) -> None:
    scaled = (x * factor).astype(np.float32)
    np.testing.assert_allclose(values(scaled, SMOOTH), values(x, SMOOTH), rtol=1e-6, atol=1e-7)


@laws
@given(LAYER)
def test_cloning_changes_only_the_entropy(x: np.ndarray) -> None:
    clones = np.concatenate([x, x])
    same, count = ["gini", "utilization"], ["effective_params"]
    np.testing.assert_allclose(values(clones, same), values(x, same), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(values(clones, count), 2 * values(x, count), rtol=1e-6)
    covered = ["coverage_50", "coverage_80", "coverage_90"]
    gain = values(x, covered) - values(clones, covered)
    # Where the last whole weight was more than needed, one of its two halves can do.
    assert np.all(-1e-6 < gain) and np.all(gain < 1 / x.size)


@laws
@given(LAYER, st.data())
def test_robin_hood_evens_out(x: np.ndarray, data: st.DataObject) -> None:
    rich, poor = int(x.argmax()), int(x.argmin())
    gap = int(x[rich] - x[poor])
    if gap < 2:
        return
    amount = data.draw(st.integers(1, gap - 1))
    given_away = x.copy()
    given_away[rich] -= amount
    given_away[poor] += amount
    assert_more_even(given_away, x)


@laws
@given(LAYER, st.integers(1, 50))
def test_a_rising_tide_evens_out(x: np.ndarray, tide: int) -> None:
    if x.min() < x.max():
        assert_more_even(x + tide, x)


@laws
@given(LAYER, st.integers(1, 50))
def test_bill_gates_concentrates(x: np.ndarray, more: int) -> None:
    x = x + 1  # in a one-hot layer nothing is left to concentrate
    richer = x.copy()
    richer[x.argmax()] += more
    assert_more_even(x, richer)


@laws
@given(LAYER)
def test_babies_concentrate(x: np.ndarray) -> None:
    baby = np.concatenate([x, np.zeros(1, np.float32)])
    assert metrics.gini(baby) > metrics.gini(x)
    count = ["effective_params"]
    np.testing.assert_allclose(values(baby, count), values(x, count), rtol=1e-6)


# Transformations.

STACK = np.stack([ARRAYS[name](300) for name in ("uniform", "lognormal 4", "one-hot", "constant 1/3")])


def by_layer(stack: np.ndarray) -> metrics.Metrics:
    layers = [summarize(x) for x in stack]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@pytest.mark.parametrize(
    "together",
    [
        jax.vmap(summarize),
        lambda stack: jax.lax.map(summarize, stack),
        lambda stack: jax.lax.scan(lambda carry, x: (carry, summarize(x)), 0, stack)[1],
    ],
    ids=["vmap", "map", "scan"],
)
def test_a_stack_of_layers_is_its_layers(together: Callable) -> None:
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, together(jnp.asarray(STACK)), by_layer(STACK))


def test_vmap_of_rows_wider_than_a_stretch_of_sums() -> None:
    stack = np.stack([ARRAYS[name](20_000) for name in ("lognormal 2", "one ulp more", "normal")])
    got = jax.vmap(summarize)(stack)
    for index, x in enumerate(stack):
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], got), reference.metrics(x))


@pytest.mark.parametrize("name", ["utilization", "gini"])
def test_vmap_of_grad_is_grad_of_each(name: str) -> None:
    slope = jax.grad(getattr(metrics, name))
    stack = jnp.asarray(STACK[:2])
    want = np.stack([slope(x) for x in stack])
    np.testing.assert_allclose(jax.vmap(slope)(stack), want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_shape_is_ignored() -> None:
    x = normal(1000)
    flat, cube = summarize(x), summarize(x.reshape(10, 20, 5))
    jax.tree.map(np.testing.assert_array_equal, flat, cube)


def test_a_second_call_of_the_same_shape_compiles_nothing(compilations) -> None:
    functions = [summarize, *ALONE.values()]
    first, second, other = normal(1000), uniform(1000).astype(np.float32), normal(1001)
    jax.block_until_ready([function(first) for function in functions])
    with compilations() as warm:
        jax.block_until_ready([function(second) for function in functions])
    with compilations() as cold:
        jax.block_until_ready(metrics.entropy(other))
    assert warm.count == 0 and cold.count > 0


def test_only_what_needs_an_order_sorts() -> None:
    x = normal(1000)
    sorting = {name for name, alone in ALONE.items() if " sort[" in str(jax.make_jaxpr(alone)(x))}
    assert sorting == {"gini", "coverage_50", "coverage_80", "coverage_90"}


@pytest.mark.parametrize(("function", "copies"), [(exact.summarize, 8), (metrics.entropy, 3.5)])
def test_scratch_memory_is_a_few_times_the_input(function: Callable, copies: float) -> None:
    size = 2**22
    program = function.lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < copies * 4 * size


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 8193])
@pytest.mark.parametrize("make", [normal, lambda n: np.full(n, 0.1, np.float32), lambda n: np.eye(1, n)[0]])
def test_padding_with_zeros_changes_nothing(size: int, make: Callable) -> None:
    x = jnp.asarray(make(size), jnp.float32)
    padded = exact.summarize_padded(jnp.pad(x, (0, 10_000 - size)), size)
    # Two roundings: N is a constant in the one and an argument in the other.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), summarize(x), padded)


@pytest.mark.parametrize("field", ["utilization", "entropy", "gini", "std", "mean", "max"])
def test_padding_with_zeros_changes_no_slope(field: str) -> None:
    x = jnp.asarray(normal(100))
    plain = jax.grad(lambda x: getattr(summarize(x), field))(x)
    padded = jax.grad(lambda x: getattr(exact.summarize_padded(jnp.pad(x, (0, 60)), 100), field))(x)
    np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-9)


# Derivatives.

POINT = np.array([0.5, 2.0, 1.25, 0.9, 7.0, 0.01, 3.0])


def finite_difference(field: str, x: np.ndarray) -> np.ndarray:
    def at(index: int, step: float) -> float:
        moved = x.copy()
        moved[index] += step
        return reference.metrics(moved)[field]

    return np.array([(at(i, 1e-6) - at(i, -1e-6)) / 2e-6 for i in range(x.size)])


@pytest.mark.parametrize("derivative", [jax.jacrev, jax.jacfwd])
def test_gradients_are_the_slopes_of_the_float64_oracle(derivative: Callable) -> None:
    got = derivative(vector_of(SLOPED))(jnp.asarray(POINT, jnp.float32))
    for field, slope in zip(SLOPED, got, strict=True):
        want = finite_difference(field, POINT)
        np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-6 * np.abs(want).max(), err_msg=field)


@pytest.mark.parametrize("name", ["entropy", "redundancy"])
def test_a_gradient_alone_is_the_one_through_the_summary(name: str) -> None:
    x = jnp.asarray(POINT, jnp.float32)
    want = jax.jacrev(vector_of(SMOOTH))(x)[SMOOTH.index(name)]
    np.testing.assert_allclose(jax.grad(getattr(metrics, name))(x), want, rtol=1e-5, atol=1e-8)


def test_zeros_have_the_slope_of_the_float64_oracle_from_the_right() -> None:
    x, fields = np.array([0.0, 2.0, 1.0, 3.5]), ["mean", "std", "gini"]
    before, after = reference.metrics(x), reference.metrics(x + [1e-7, 0, 0, 0])
    got = jax.jacrev(vector_of(fields))(jnp.asarray(x, jnp.float32))[:, 0]
    np.testing.assert_allclose(got, [(after[name] - before[name]) / 1e-7 for name in fields], rtol=1e-4)


def naive_entropy(x: jax.Array) -> jax.Array:
    p = x / x.sum()
    return -(p * jnp.log(p)).sum()


def naive_gini(x: jax.Array) -> jax.Array:
    rank = 2 * jnp.arange(1, x.size + 1, dtype=x.dtype) - x.size - 1
    return (rank * jnp.sort(x)).sum() / (x.size * x.sum())


NAIVE = {
    "entropy": naive_entropy,
    "normalized_entropy": lambda x: naive_entropy(x) / math.log(x.size),
    "effective_params": lambda x: jnp.exp(naive_entropy(x)),
    "utilization": lambda x: jnp.exp(naive_entropy(x)) / x.size,
    "redundancy": lambda x: 1 - naive_entropy(x) / math.log(x.size),
    "gini": naive_gini,
    "std": jnp.std,
}


def naive(x: jax.Array) -> jax.Array:
    return jnp.stack([metric(x) for metric in NAIVE.values()])


@pytest.mark.parametrize("derivative", [jax.jacrev, jax.hessian])
def test_derivatives_of_both_orders_are_those_of_the_naive_formulas(derivative: Callable) -> None:
    x = jnp.asarray(POINT, jnp.float32)
    for field, got, want in zip(
        NAIVE, derivative(vector_of([*NAIVE]))(x), np.asarray(derivative(naive)(x)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=field)


def test_gradients_of_a_large_layer_are_those_of_the_naive_formulas() -> None:
    x = jnp.asarray(normal(20_000)) + 0.01
    for field, got, want in zip(
        NAIVE, jax.jacrev(vector_of([*NAIVE]))(x), np.asarray(jax.jacrev(naive)(x)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=field)


def test_equal_weights_have_equal_gini_slopes() -> None:
    slopes = jax.grad(metrics.gini)(jnp.array([2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0]))
    assert len(set(slopes.tolist())) == 3
    np.testing.assert_allclose(jax.grad(metrics.gini)(jnp.full(5, 0.1)), np.zeros(5), atol=1e-6)


@pytest.mark.parametrize(
    "x", [[0, 0, 2], [0, 0, 0], [5], [3, 3, 3], [1e-45, 0, 0], [1, math.nan, 0], [1, math.inf, 0], [1, -1, 0]]
)
def test_gradients_are_finite(x: list[float]) -> None:
    fields = [name for name in FIELDS if name not in COUNTS]
    slopes = jax.jacrev(vector_of(fields))(np.float32(x))
    assert jnp.all(jnp.isfinite(slopes)), dict(zip(fields, slopes.tolist(), strict=True))


def test_entropy_takes_the_slope_at_zero_as_zero() -> None:
    x = jnp.array([0.0, 1.0, 3.0])
    slope = jax.grad(metrics.entropy)(x)
    assert slope[0] == 0
    np.testing.assert_allclose(slope[1:], jax.grad(naive_entropy)(x[1:]), rtol=1e-5)


def test_counts_have_no_slope() -> None:
    fields = sorted(set(ALONE) - set(SMOOTH))
    slopes = jax.jacrev(vector_of(fields))(jnp.asarray(POINT, jnp.float32))
    np.testing.assert_array_equal(slopes, np.zeros((len(fields), POINT.size)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_come_in_the_dtype_of_the_weights(dtype) -> None:
    x = jnp.asarray(POINT, dtype)
    slope = jax.grad(metrics.gini)(x)
    assert slope.dtype == dtype
    want = jax.grad(metrics.gini)(x.astype(jnp.float32))
    np.testing.assert_allclose(slope.astype(jnp.float32), want, rtol=1e-2)


def test_descending_the_entropy_concentrates_a_layer() -> None:
    def step(logits: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loss, slope = jax.value_and_grad(lambda z: metrics.utilization(jnp.abs(z)))(logits)
        return logits - 20 * slope, loss

    _, losses = jax.lax.scan(step, jnp.asarray(normal(64)), length=20)
    assert losses[-1] < 0.9 * losses[0]


# Methods


def test_the_two_methods_agree() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(100_003)).astype(np.float32)
    by_order, by_counts = metrics.summarize(x, method="exact"), metrics.summarize(x, method="sketch")
    for field in dataclasses.fields(by_order):
        close = pytest.approx(float(getattr(by_order, field.name)), rel=6e-6, abs=6e-6)
        assert float(getattr(by_counts, field.name)) == close, field.name


def test_without_a_method_large_arrays_are_sketched() -> None:
    shapes = {size: jax.ShapeDtypeStruct((size,), jnp.float32) for size in (1 << 16, 1 << 22)}
    primitives = {
        size: {equation.params.get("name") for equation in jax.make_jaxpr(metrics.summarize)(shape).eqns}
        for size, shape in shapes.items()
    }
    assert primitives[1 << 16] == {"summarize"} and "summarize" not in primitives[1 << 22]


def test_a_sketch_has_the_derivative_of_sorting() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    ours, theirs = (
        jax.grad(lambda x, method=method: metrics.summarize(x, method=method).gini)(x)
        for method in ("sketch", "exact")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="`method` must be 'exact', 'sketch' or None, got 'fast'"):
        metrics.summarize(jnp.ones(3), method="fast")
