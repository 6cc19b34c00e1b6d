"""Metrics against float64 oracles, closed forms, and the laws a measure of concentration obeys.

How good they have to be is said in one place, `drawn.assert_as_promised`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import metrics
from jaxeff.metrics import _order, sketch, summarize
from jaxeff.metrics._weighted import metrics_of, sums_of
from jaxeff.numerics.summation import running_total

FIELDS = [field.name for field in dataclasses.fields(metrics.Metrics)]
COUNTS = ["zeros", "nonfinite", "size"]
FLOATS = [name for name in FIELDS if name not in COUNTS]
SMOOTH = ["entropy", "normalized_entropy", "effective_params", "utilization", "redundancy", "gini"]
SLOPED = [*SMOOTH, "mean", "std", "max"]
SCALE_FREE = [*SMOOTH, *drawn.COVERAGES, *drawn.THRESHOLDS]
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
SORTED, LARGE = 16_384, 100_003


def of_padded(x: jax.Array, size) -> metrics.Metrics:
    return metrics_of(sums_of(_order.spread_of(x, size)))


# As layers are summarized, of many sizes by one program: every size compiles anew in `summarize`.
by_row = jax.jit(jax.vmap(of_padded))
small = jax.jit(of_padded)


def rows_of(found: metrics.Metrics) -> list[metrics.Metrics]:
    found = jax.tree.map(np.asarray, found)
    return [jax.tree.map(lambda leaf, at=at: leaf[at], found) for at in range(len(found.size))]


def values(x: np.ndarray, fields: list[str]) -> np.ndarray:
    found = small(np.pad(x.astype(np.float32), (0, 20 - x.size)), x.size)
    return np.array([float(getattr(found, name)) for name in fields])


def vector_of(fields: list[str], function: Callable = summarize) -> Callable[[jax.Array], jax.Array]:
    """The fields as one vector function, for its Jacobian."""

    def vector(x: jax.Array) -> jax.Array:
        found = function(x)
        return jnp.stack([getattr(found, name) for name in fields])

    return vector


def normal(n: int, dtype=np.float32) -> np.ndarray:
    return np.abs(np.random.default_rng(n).standard_normal(n)).astype(dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, SORTED - 1, SORTED])
def test_sorted_arrays_have_the_metrics_of_float64(size: int) -> None:
    arrays = {name: drawn.draw(name, 0, size).astype(np.float32) for name in drawn.DRAWS}
    stack = np.stack([np.pad(x, (0, SORTED - size)) for x in arrays.values()])
    found = rows_of(by_row(stack, np.full(len(stack), size, np.int32)))
    for (name, x), ours in zip(arrays.items(), found, strict=True):
        drawn.assert_as_promised(ours, x, f"{name}, {size}")


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_on_the_host_arrays_have_the_metrics_of_float64(size: int) -> None:
    for name in drawn.DRAWS:
        x = drawn.draw(name, 0, size).astype(np.float32)
        drawn.assert_as_promised(metrics_of(sums_of(_order.spread_on_host(x))), x, f"{name}, {size}")
        wide = x.astype(np.float64) / (x.max() or 1)
        assert _order.squares_on_host(x) == pytest.approx(wide.var() * size, rel=1e-6), f"{name}, {size}"


def test_counted_arrays_have_the_metrics_of_float64() -> None:
    # Bins of subnormals are wide: what is known of them the bounds of a sketch say.
    coarse = {"subnormal", "smallest", "about the smallest normal", "subnormal and normal"}
    for name in drawn.DRAWS.keys() - coarse:
        x = drawn.draw(name, 0, LARGE).astype(np.float32)
        drawn.assert_as_promised(summarize(x), x, name, counted=True)


def test_ten_million_weights_spread_evenly_have_the_closed_forms() -> None:
    found = summarize((np.arange(10**7, dtype=np.float32) + 0.5) / 10**7)
    close = partial(pytest.approx, abs=2e-6)
    assert float(found.utilization) == close(math.sqrt(math.e) / 2) and float(found.gini) == close(1 / 3)
    assert float(found.coverage_80) == close(1 - math.sqrt(0.2))
    assert float(found.mean) == close(0.5) and float(found.std) == close(1 / math.sqrt(12))
    assert float(found.relative_sparsity_1e2) == pytest.approx(0.005, abs=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e5m2, jnp.int32])
def test_metrics_of_other_dtypes_are_those_of_float32(dtype) -> None:
    x = np.random.default_rng(0).integers(0, 1000, 1000).astype(dtype)
    found = summarize(x)
    drawn.assert_as_promised(found, np.asarray(x, np.float32))
    assert {getattr(found, field).dtype for field in FIELDS} == {jnp.dtype("float32"), jnp.dtype("int32")}


alone_of = jax.jit(lambda x: {name: alone(x) for name, alone in ALONE.items()})


def test_a_metric_alone_is_the_one_in_the_summary() -> None:
    for draw in ("lognormal", "one-hot", "one ulp more", "subnormal", "half zero"):
        x = drawn.draw(draw, 0, 20)
        found, together = alone_of(x), small(x, 20)
        for name in ALONE:
            close = pytest.approx(float(getattr(together, name)), rel=2e-6, abs=1e-6, nan_ok=True)
            assert float(found[name]) == close, (draw, name)


def test_the_reference_gini_is_the_definition() -> None:
    x = [0.5, 2.0, 0.0, 1.0, 1.0, 7.0]
    assert reference.gini(np.array(x)) == pytest.approx(float(reference.exact_gini(x)), rel=1e-15)


def test_float64_is_computed_in_float64(x64: None) -> None:
    even, uneven = normal(1000, np.float64), np.exp(3 * normal(1000, np.float64))
    for x in (even, uneven, 0.1 + 1e-9 * even, 1e-150 * even):
        found, want = summarize(x), reference.metrics(x)
        for name in FIELDS:
            scale = max(1, want[name]) if name in SCALE_FREE else x.mean()
            assert abs(float(getattr(found, name)) - want[name]) <= 1e-11 * scale, name
        assert {found.entropy.dtype, found.gini.dtype, found.std.dtype} == {jnp.dtype("float64")}


def test_float32_stays_float32_with_x64_on(x64: None) -> None:
    found = summarize(normal(LARGE))
    drawn.assert_as_promised(found, normal(LARGE), counted=True)
    assert found.entropy.dtype == jnp.float32 and found.zeros.dtype == jnp.int32


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_no_implicit_promotion(dtype) -> None:
    layer = jax.ShapeDtypeStruct((20_000,), dtype)  # promotion is decided in tracing
    for function in (summarize, *ALONE.values()):
        jax.eval_shape(function, layer)
    if dtype != jnp.int32:
        jax.eval_shape(jax.hessian(vector_of(SLOPED)), jax.ShapeDtypeStruct((8,), dtype))


def test_running_sums_go_on_where_those_of_single_floats_stop() -> None:
    # Adding 1 to 2^24 changes no float32.
    through = jax.jit(running_total)(np.ones(2**25, np.float32))
    assert through[-1] == 2**25 and through[2**24 + 2**20] == pytest.approx(2**24 + 2**20 + 1, abs=2)


# Closed forms.


def test_normal_weights_have_gini_root_2_less_1() -> None:
    quantile = NormalDist().inv_cdf
    x = np.array([quantile(0.5 + (i + 0.5) / (2 * SORTED)) for i in range(SORTED)], np.float32)
    rows = len(drawn.DRAWS)
    found = rows_of(by_row(np.broadcast_to(x, (rows, SORTED)), np.full(rows, SORTED, np.int32)))[0]
    assert float(found.gini) == pytest.approx(math.sqrt(2) - 1, abs=1e-4)
    assert float(found.utilization) == pytest.approx(0.7529, rel=1e-3)


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


def test_of_ten_million_equal_weights_a_share_is_held_by_that_fraction() -> None:
    found = summarize(np.full(10**7, 0.3, np.float32))
    assert [float(found.coverage_50), float(found.coverage_80)] == pytest.approx([0.5, 0.8], abs=2e-6)


def test_a_numpy_share_is_the_same_share() -> None:
    x = np.full(10, 0.3, np.float32)
    assert metrics.coverage(x, np.float32(0.5)) == metrics.coverage(x, 0.5) == 0.5


def test_shares_other_than_the_usual_agree_with_float64() -> None:
    x = drawn.draw("lognormal", 0, 1000)
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
    assert metrics.relative_sparsity(equal, 1.00001) == 1
    assert metrics.relative_sparsity(equal, 1e300) == 1
    assert metrics.relative_sparsity(jnp.zeros(3), 0.5) == 1
    x = drawn.draw("lognormal", 0, 1000)
    for threshold in (0, 0.1, 0.5, 3):
        got = float(metrics.relative_sparsity(x, threshold))
        assert got == pytest.approx(reference.relative_sparsity(x, threshold), rel=1e-6)


# Degenerate and invalid layers.


@pytest.mark.parametrize("size", [1, 9])
def test_an_all_zero_layer_is_dead_rather_than_even(size: int) -> None:
    got = small(jnp.zeros(20), size)
    nan = ["entropy", "normalized_entropy", "gini", "coverage_50", "coverage_80", "coverage_90"]
    assert all(jnp.isnan(getattr(got, name)) for name in nan)
    assert got.effective_params == got.utilization == 0
    assert got.redundancy == got.relative_sparsity_1e2 == got.relative_sparsity_1e3 == 1
    assert got.sparsity_1e2 == got.sparsity_1e3 == 1
    assert got.mean == got.std == got.max == got.nonfinite == 0
    assert got.zeros == got.size == size


def test_a_single_weight_is_even() -> None:
    got = summarize(jnp.array(0.3))
    assert got.entropy == got.redundancy == got.gini == got.std == 0
    assert got.normalized_entropy == got.effective_params == got.utilization == got.coverage_50 == 1


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_equal_weights_are_perfectly_even(n: int) -> None:
    x = np.full(n, 0.1, np.float32)
    even = values(x, ["utilization", "normalized_entropy", "redundancy", "gini", "std"])
    np.testing.assert_allclose(even, [1, 1, 0, 0, 0], atol=5e-7)
    np.testing.assert_allclose(values(x, ["mean", "max"]), np.float32(0.1), rtol=3e-7)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_an_invalid_importance_makes_every_metric_nan(bad: float) -> None:
    got = small(np.pad(np.float32([1, 0, bad, 2, bad, -0.0]), (0, 14)), 6)
    assert {name for name in FIELDS if jnp.isnan(getattr(got, name))} == set(FIELDS) - set(COUNTS)
    assert (got.zeros, got.nonfinite, got.size) == (2, 2, 6)


def test_an_invalid_importance_makes_a_metric_alone_nan() -> None:
    x = np.where(np.arange(20) == 7, math.nan, 1).astype(np.float32)
    assert all(jnp.isnan(found) for found in alone_of(x).values())


def test_negative_zero_is_zero() -> None:
    negative, positive = (values(np.float32([zero, 1, 1]), FIELDS) for zero in (-0.0, 0.0))
    np.testing.assert_array_equal(negative, positive)


@pytest.mark.parametrize("function", [summarize, sketch.count, *ALONE.values()])
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

LAYER = st.lists(st.integers(0, 50), min_size=8, max_size=8).filter(any).map(np.float32)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def assert_more_even(x: np.ndarray, than: np.ndarray) -> None:
    rising, falling = ["utilization", "normalized_entropy"], ["gini", "redundancy"]
    assert np.all(values(x, rising) > values(than, rising))
    assert np.all(values(x, falling) < values(than, falling))


@laws
@given(LAYER, st.permutations(range(8)))
def test_order_changes_nothing(x: np.ndarray, order: list[int]) -> None:
    np.testing.assert_array_equal(values(x[order], FIELDS), values(x, FIELDS))


@laws
@given(LAYER, st.floats(1e-30, 1e30))
def test_scaling_changes_nothing(x: np.ndarray, factor: float) -> None:
    scaled = (x * factor).astype(np.float32)
    np.testing.assert_allclose(values(scaled, SMOOTH), values(x, SMOOTH), rtol=2e-6, atol=1e-6)
    moments = ["mean", "std", "max"]
    np.testing.assert_allclose(values(scaled, moments), factor * values(x, moments), rtol=5e-6)


@laws
@given(LAYER)
def test_cloning_changes_only_the_entropy(x: np.ndarray) -> None:
    clones = np.concatenate([x, x])
    same, count = ["gini", "utilization"], ["effective_params"]
    np.testing.assert_allclose(values(clones, same), values(x, same), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(values(clones, count), 2 * values(x, count), rtol=5e-6)
    covered = [*drawn.COVERAGES]
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
    assert values(baby, ["gini"]) > values(x, ["gini"])
    count = ["effective_params"]
    np.testing.assert_allclose(values(baby, count), values(x, count), rtol=5e-6)


# Transformations.


@pytest.mark.parametrize(
    ("together", "size"),
    [
        (jax.vmap(summarize), LARGE),
        (lambda stack: jax.lax.scan(lambda carry, x: (carry, summarize(x)), 0, stack)[1], 1000),
    ],
    ids=["vmap", "scan"],
)
def test_a_stack_of_layers_is_its_layers(together: Callable, size: int) -> None:
    stack = np.stack([drawn.draw(name, 1, size) for name in ("lognormal", "one-hot", "normal")])
    for x, found in zip(stack, rows_of(together(jnp.asarray(stack))), strict=True):
        drawn.assert_as_promised(found, x, counted=size == LARGE)


def test_vmap_of_grad_is_grad_of_each() -> None:
    slopes = jax.jit(jax.vmap(jax.grad(lambda x: metrics.utilization(x) + metrics.gini(x))))
    stack = np.stack([POINT, POINT[::-1] ** 2]).astype(np.float32)
    at = [FLOATS.index("utilization"), FLOATS.index("gini")]
    want = np.stack([np.asarray(slopes_of(x))[at].sum(axis=0) for x in stack])
    np.testing.assert_allclose(slopes(stack), want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_shape_is_ignored() -> None:
    x = normal(1000)
    jax.tree.map(np.testing.assert_array_equal, summarize(x), summarize(x.reshape(10, 20, 5)))


def test_a_second_call_of_the_same_shape_compiles_nothing(compilations) -> None:
    functions = [summarize, metrics.entropy, metrics.gini, ALONE["coverage_80"], ALONE["sparsity_1e2"]]
    first, second, other = normal(1000), normal(1000)[::-1].copy(), normal(1001)
    jax.block_until_ready([function(first) for function in functions])
    with compilations() as warm:
        jax.block_until_ready([function(second) for function in functions])
    with compilations() as cold:
        jax.block_until_ready(metrics.entropy(other))
    assert warm.count == 0 and cold.count > 0


def test_only_what_needs_an_order_sorts() -> None:
    x = normal(1000)
    sorting = {name for name, alone in ALONE.items() if " sort[" in str(jax.make_jaxpr(alone)(x))}
    assert sorting == {"gini", *drawn.COVERAGES}


@pytest.mark.parametrize(("size", "sorts"), [(SORTED, True), (SORTED + 1, False)])
def test_large_arrays_are_counted(size: int, sorts: bool) -> None:
    program = str(jax.make_jaxpr(summarize)(jax.ShapeDtypeStruct((size,), jnp.float32)))
    assert (" sort[" in program, "scatter-add[" in program) == (sorts, not sorts)


@pytest.mark.parametrize("function", [sketch.count, metrics.entropy])
def test_scratch_memory_is_a_few_copies_at_most(function: Callable) -> None:
    size = 10**7
    program = function.lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3.5 * 4 * size


# Derivatives.

POINT = np.array([0.5, 2.0, 1.25, 0.9, 7.0, 0.01, 3.0, 0.2])
# One program for every point of eight weights.
slopes_of = jax.jit(jax.jacrev(vector_of(FLOATS)))


@jax.jit
def padded_slopes_of(x: jax.Array, size=8) -> jax.Array:
    return jax.jacfwd(vector_of(FLOATS, lambda x: of_padded(jnp.pad(x, (0, 12)), size)))(x)


def finite_difference(field: str, x: np.ndarray) -> np.ndarray:
    def at(index: int, step: float) -> float:
        moved = x.copy()
        moved[index] += step
        return reference.metrics(moved)[field]

    return np.array([(at(i, 1e-6) - at(i, -1e-6)) / 2e-6 for i in range(x.size)])


@pytest.mark.parametrize("derivative", [slopes_of, padded_slopes_of], ids=["reverse", "forward, padded"])
def test_gradients_are_the_slopes_of_the_float64_oracle(derivative: Callable) -> None:
    for field, slope in zip(FLOATS, derivative(POINT.astype(np.float32)), strict=True):
        # Counts have none.
        want = finite_difference(field, POINT) if field in SLOPED else np.zeros(8)
        np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=field)


@pytest.mark.parametrize("name", ["entropy", "redundancy"])
def test_a_gradient_alone_is_the_one_through_the_summary(name: str) -> None:
    x = POINT.astype(np.float32)
    want = slopes_of(x)[FLOATS.index(name)]
    np.testing.assert_allclose(jax.grad(getattr(metrics, name))(x), want, rtol=1e-5, atol=1e-8)


def test_zeros_have_the_slope_of_the_float64_oracle_from_the_right() -> None:
    x = np.array([0.0, 2.0, 1.0, 3.5, 4.0, 5.0, 6.0, 0.5])
    before, after = reference.metrics(x), reference.metrics(x + 1e-7 * np.eye(8)[0])
    for name in ("mean", "std", "gini"):
        slope = float(slopes_of(x.astype(np.float32))[FLOATS.index(name), 0])
        assert slope == pytest.approx((after[name] - before[name]) / 1e-7, rel=1e-4)


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


def test_second_derivatives_are_those_of_the_naive_formulas() -> None:
    found, wanted = (
        jax.jit(jax.hessian(function))(POINT.astype(np.float32)) for function in (vector_of([*NAIVE]), naive)
    )
    for field, got, want in zip(NAIVE, found, np.asarray(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=field)


def test_gradients_of_a_counted_layer_are_those_of_the_naive_formulas() -> None:
    x = normal(20_000) + np.float32(0.01)
    found, wanted = (
        jax.jit(jax.grad(lambda x, function=function: function(x) @ np.float32([0.1, 1, 1])))(x)
        for function in (
            vector_of(["entropy", "gini", "std"]),
            lambda x: jnp.stack([naive_entropy(x), naive_gini(x), jnp.std(x)]),
        )
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "x", [[0, 0, 2], [0], [3] * 8, [1e-45], [1, math.nan, 0], [1, math.inf, 0], [1, -1, 0]], ids=str
)
def test_gradients_are_finite(x: list[float]) -> None:
    slopes = slopes_of(np.pad(np.float32(x), (0, 8 - len(x))))
    assert jnp.all(jnp.isfinite(slopes)), dict(zip(FLOATS, slopes.tolist(), strict=True))


def test_the_gradient_of_a_single_weight_is_zero_but_for_its_size() -> None:
    slopes = padded_slopes_of(np.float32([5, 0, 0, 0, 0, 0, 0, 0]), 1)[:, 0]
    np.testing.assert_array_equal(slopes, [float(name in ("mean", "max")) for name in FLOATS])


def test_entropy_takes_the_slope_at_zero_as_zero() -> None:
    x = np.where(np.arange(8) < 2, 0, POINT).astype(np.float32)
    slope = slopes_of(x)[FLOATS.index("entropy")]
    assert slope[0] == slope[1] == 0
    np.testing.assert_allclose(slope[2:], jax.grad(naive_entropy)(x[2:]), rtol=1e-5, atol=1e-7)


def test_gradients_come_in_the_dtype_of_the_weights() -> None:
    slope = jax.grad(metrics.gini)(jnp.asarray(POINT, jnp.bfloat16))
    want = slopes_of(jnp.asarray(POINT, jnp.bfloat16).astype(jnp.float32))[FLOATS.index("gini")]
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(slope.astype(jnp.float32), want, rtol=1e-2)


def test_descending_the_entropy_concentrates_a_layer() -> None:
    def step(logits: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loss, slope = jax.value_and_grad(lambda z: metrics.utilization(jnp.abs(z)))(logits)
        return logits - 20 * slope, loss

    _, losses = jax.lax.scan(step, jnp.asarray(normal(64)), length=20)
    assert losses[-1] < 0.9 * losses[0]
