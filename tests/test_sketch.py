"""Sketches: certified bounds against float64, and the laws of merging, cutting, padding and sharding."""

import dataclasses
import functools
import json
import math
import os
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import drawn
import jax
import jax.export  # not an attribute of jax before it is imported
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff import bins, sketch
from jaxeff.sketch import merge, refine, summarize, summarize_array

LARGE = 100_003  # prime: no piece divides it
CERTIFIED = 3e-6
FLOATS = [name for name in drawn.DRAWS if drawn.draw(name, 0, 2).dtype == np.float32]
NARROW = [name for name in drawn.DRAWS if name not in FLOATS]
WHOLE = sketch.sketch  # the module has the name of its function


def padded(x: np.ndarray) -> jax.Array:
    """[LARGE], so that arrays of all sizes share one program."""
    return jnp.asarray(np.pad(x, (0, LARGE - x.size)))


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_certified(found, want: dict[str, float], label: str) -> None:
    found, bounds = found
    for name, error in drawn.errors(found, want).items():
        bound = float(getattr(bounds, name))
        assert error <= bound, f"{label}: {name} is off by {error}, certified to {bound}"
    for name in ("zeros", "nonfinite", "size"):
        assert int(getattr(found, name)) == want[name], f"{label}: {name}"


# Bounds.


@pytest.mark.parametrize("name", FLOATS)
def test_bounds_hold_and_a_second_pass_makes_them_small(name: str) -> None:
    for size, seeds in {1: 2, 2: 2, 7: 2, 1000: 2, LARGE: 1}.items():
        for seed in range(seeds):
            x, label = drawn.draw(name, seed, size), f"{name} {seed} of {size}"
            want, layer = drawn.exact(x), padded(x)
            counts = WHOLE(layer, size)
            assert_certified(summarize(counts), want, label)
            fine = summarize(counts, refine(counts, layer))
            assert_certified(fine, want, f"{label}, refined")
            if size == LARGE:
                assert max(dataclasses.astuple(fine[1])) < CERTIFIED, label


@pytest.mark.parametrize("name", NARROW)
def test_narrow_dtypes_are_exact_but_for_rounding(name: str) -> None:
    x = drawn.draw(name, 0, 1000)
    want, found = drawn.exact(x), summarize(WHOLE(x))
    assert_certified(found, want, name)
    assert max(dataclasses.astuple(found[1])) < CERTIFIED


def test_a_mean_of_few_units_in_the_last_place_is_not_its_floor() -> None:
    x = np.repeat(np.arange(4, dtype=np.uint32), [5, 6, 8, 1]).view(np.float32)
    counts = WHOLE(padded(x), 20)
    assert_certified(summarize(counts), drawn.exact(x), "subnormals")
    for _ in range(28):  # more than 2^31 in one bin, and then more than 2^32
        counts = merge(counts, counts)
    assert_certified(summarize(counts), exact_copies(x, 2**28), "more subnormals")


def test_half_of_the_sum_is_reached_also_where_the_mean_is_no_float() -> None:
    x = np.repeat(np.arange(3, dtype=np.uint32), [2, 2, 1]).view(np.float32)
    assert_certified(summarize(WHOLE(padded(x), 5)), drawn.exact(x), "a tie")


def test_both_passes_at_once_are_the_two_in_turn() -> None:
    x = drawn.draw("lognormal", 1, LARGE)
    counts = WHOLE(x)
    apart, at_once = summarize(counts, refine(counts, x)), summarize_array(x)
    for (found, bounds), label in ((apart, "in turn"), (at_once, "at once")):
        assert_certified((found, bounds), drawn.exact(x), label)
        assert max(dataclasses.astuple(bounds)) < CERTIFIED


# Merging.


@pytest.mark.parametrize("name", ["normal", "one bin", "bits", "subnormal and normal", "half zero"])
def test_merging_the_parts_gives_the_sketch_of_the_whole(name: str) -> None:
    x = drawn.draw(name, 0, LARGE)
    a, b, c = (WHOLE(part) for part in np.split(x, [1000, 50_000]))
    whole = WHOLE(x)
    assert_same(merge(merge(a, b), c), whole)
    assert_same(merge(a, merge(b, c)), whole)
    assert_same(merge(merge(c, a), b), whole)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, LARGE - 1), st.sampled_from(["wide", "clusters", "few"]))
def test_a_cut_anywhere_changes_no_bit(cut: int, name: str) -> None:
    x = drawn.draw(name, 0, LARGE)
    parts = WHOLE(padded(x[:cut]), cut), WHOLE(padded(x[cut:]), LARGE - cut)
    assert_same(merge(*parts), WHOLE(x))


@pytest.mark.parametrize("name", ["clusters", "one bin", "beside a limit"])
def test_merging_refinements_by_the_parts_gives_that_by_the_whole(name: str) -> None:
    x = drawn.draw(name, 0, LARGE)
    whole = WHOLE(x)
    parts = [refine(whole, padded(part)) for part in np.split(x, [1000, 50_000])]
    assert_same(functools.reduce(merge, parts), refine(whole, x))


def test_merging_unlike_things_is_refused() -> None:
    whole = WHOLE(np.ones(1000, np.float32))
    with pytest.raises(TypeError, match="`a` and `b` must be two sketches.*got Sketch and Refinement"):
        merge(whole, refine(whole, padded(np.ones(1, np.float32))))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4096, 16_385])
def test_padding_changes_no_bit(size: int) -> None:
    x = drawn.draw("half zero", 0, size)
    assert_same(WHOLE(padded(x), size), WHOLE(x))


def test_shape_and_order_change_no_bit() -> None:
    x = drawn.draw("lognormal", 0, 1000)
    assert_same(WHOLE(x.reshape(10, 4, 25)), WHOLE(x[::-1].copy()))
    assert_same(WHOLE(jnp.float32(0.3)), WHOLE(np.float32([0.3])))


def test_merging_dtypes_keeps_what_all_of_them_know() -> None:
    narrow, wide = drawn.draw("bfloat16", 0, 1000), drawn.draw("normal", 0, 1000)
    both = np.concatenate([narrow.astype(np.float32), wide])
    assert_same(merge(WHOLE(narrow), WHOLE(wide)), WHOLE(both))


def test_a_sketch_through_a_loop_is_the_sketch_of_all() -> None:
    x = jnp.asarray(drawn.draw("normal", 0, 1000)).reshape(10, 100)
    each = jax.vmap(WHOLE)(x)
    first = jax.tree.map(lambda leaf: leaf[0], each)
    others = jax.tree.map(lambda leaf: leaf[1:], each)
    total, _ = jax.lax.scan(lambda sum, part: (merge(sum, part), None), first, others)
    assert_same(total, WHOLE(x))


# Of many copies.


def exact_copies(x: np.ndarray, copies: int) -> dict[str, float]:
    """Metrics of x [n] repeated, from those of one by closed forms and coverage in rational numbers."""
    want = drawn.exact(x)
    size, log_size = x.size * copies, math.log(x.size * copies)
    want |= {name: int(min(want[name] * copies, 2**31 - 1)) for name in ("zeros", "size")}
    want["entropy"] += math.log(copies)
    want["effective_params"] *= copies
    want["redundancy"] *= math.log(x.size) / log_size
    want["normalized_entropy"] = 1 - want["redundancy"]
    fallen = sorted((Fraction(float(value)) for value in x if value > 0), reverse=True)
    for name, share in drawn.COVERAGES.items():
        missing, count = Fraction(share) * Fraction(drawn.reference.TIE) * sum(fallen) * copies, 0
        for value in fallen:
            if missing <= value * copies:
                count += math.ceil(missing / value)
                break
            missing, count = missing - value * copies, count + copies
        want[name] = count / size
    return want


@pytest.mark.parametrize("doublings", [10, 22, 24, 29])
@pytest.mark.parametrize(
    "name", ["normal", "constant", "one bin", "ternary", "half zero", "bits", "smallest", "float16"]
)
def test_copies_of_an_array_have_its_metrics_in_closed_form(name: str, doublings: int) -> None:
    # Up to 2^39 weights, all of them in one bin for the constant.
    x = drawn.draw(name, 0, 1000)
    whole = WHOLE(x)
    for _ in range(doublings):
        whole = merge(whole, whole)
    assert_certified(summarize(whole), exact_copies(x, 2**doublings), f"{name} 2^{doublings} times")


def test_a_refinement_bounds_more_than_two_to_the_24_weights_of_one_bin() -> None:
    x = drawn.draw("one bin", 0, 1000)
    whole = WHOLE(np.tile(x, 20_000))
    merged = functools.reduce(merge, [WHOLE(np.tile(x, 5_000))] * 4)
    assert_same(merged, whole)
    found = summarize(whole, refine(whole, np.tile(x, 20_000)))
    assert_certified(found, exact_copies(x, 20_000), "one bin")
    assert max(dataclasses.astuple(found[1])) < CERTIFIED


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_places_in_a_cell_cannot_sum_to_more_than_a_word(share: float) -> None:
    # A crowded bin among many: its weights decide how finely it is cut.
    generator = np.random.default_rng(0)
    x = np.where(generator.random(LARGE) < share, 1, generator.uniform(20, 80, LARGE)).astype(np.float32)
    whole = WHOLE(x)
    for _ in range(14):
        whole = merge(whole, whole)
    layout = np.unique(np.asarray(refine(whole, x).layout))
    assert layout.size > 1000
    crowded, depths = layout >> 4, layout & 15
    weights = np.asarray(whole.sums)[..., 0].reshape(-1)[crowded].astype(np.uint64)
    assert np.all((weights * ((1 << 14 - depths) - 1))[depths > 0] < 2**32)


# What is no importance, and what is no layer.


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_an_invalid_importance_makes_every_metric_nan(bad: float) -> None:
    x = np.float32([1, 0, bad, 2, bad, -0.0, 3])
    counts = WHOLE(padded(x), 7)
    for found, bounds in (summarize(counts), summarize(counts, refine(counts, padded(x)))):
        assert all(math.isnan(getattr(found, name)) for name in drawn.FIELDS)
        assert (found.zeros, found.nonfinite, found.size) == (2, 2, 7)
        assert not any(dataclasses.astuple(bounds))


def test_an_array_of_zeros_stands_by_convention() -> None:
    x = np.zeros(7, np.float32)
    found, bounds = summarize(WHOLE(padded(x), 7))
    assert_certified((found, bounds), drawn.exact(x), "zeros")
    assert not any(dataclasses.astuple(bounds))


def test_more_weights_than_one_pass_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="`x`.*merge"):
        jax.eval_shape(WHOLE, jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))


@pytest.mark.parametrize("value", [3, 2**24 + 1, 0])
def test_integers_count_as_the_nearest_float32(value: int) -> None:
    x = np.array([value, 7, 1], np.int32)
    assert_same(WHOLE(x), WHOLE(x.astype(np.float32)))


def test_float64_counts_as_the_nearest_float32(x64: None) -> None:
    x = np.random.default_rng(0).random(7)
    counts = WHOLE(x)
    assert_same(counts, WHOLE(x.astype(np.float32)))
    assert_certified(summarize(counts), drawn.exact(x.astype(np.float32)), "uniform")
    assert int(summarize(WHOLE(np.full(7, 1e300)))[0].nonfinite) == 7


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_no_implicit_promotion(dtype) -> None:
    layer = jax.ShapeDtypeStruct((20_000,), dtype)
    jax.eval_shape(summarize_array, layer)
    jax.eval_shape(WHOLE, layer, jax.ShapeDtypeStruct((), jnp.int32))


# Transformations.


def test_vmap_counts_row_by_row() -> None:
    stack = jnp.asarray(np.stack([drawn.draw(name, 0, 1000) for name in ("normal", "few", "one bin")]))
    sizes = jnp.array([1000, 1000, 1000])
    together = jax.jit(jax.vmap(WHOLE))(stack, sizes)
    for index, x in enumerate(stack):
        assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], together), WHOLE(x))


def test_jit_and_eager_count_alike() -> None:
    x = drawn.draw("normal", 0, 1000)
    with jax.disable_jit():
        eager = WHOLE(x)
    assert_same(jax.jit(WHOLE)(x), eager)


def test_a_sketch_has_no_slope() -> None:
    x = jnp.asarray(drawn.draw("normal", 0, 1000))
    slope = jax.grad(lambda x: summarize(WHOLE(x))[0].entropy + x.sum())(x)
    np.testing.assert_array_equal(slope, np.ones_like(x))


def test_a_second_call_of_the_same_shape_compiles_nothing(compilations) -> None:
    first, second = (drawn.draw("normal", seed, 1000) for seed in (0, 1))
    jax.block_until_ready(summarize(WHOLE(first)))
    with compilations() as warm:
        jax.block_until_ready(summarize(WHOLE(second)))
    assert warm.count == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("function", [WHOLE, summarize_array])
def test_it_lowers_for_accelerators(function, platform: str) -> None:
    layer = jax.ShapeDtypeStruct((1000, 7), jnp.float32)
    assert jax.export.export(jax.jit(function), platforms=[platform])(layer).mlir_module_serialized


def test_what_an_accelerator_runs_counts_alike() -> None:
    sort, scatter = jax.jit(bins._sorted), jax.jit(bins._scattered)
    sort_again, scatter_again = jax.jit(bins._filled_by_sort), jax.jit(bins._filled)
    for name in ("normal", "bits", "one bin", "half zero", "clusters", "beside a limit", "smallest"):
        x = jnp.asarray(drawn.draw(name, 0, LARGE))
        assert_same(sort(x), scatter(x))
        fine, limits = refine(WHOLE(x), x), jnp.array([1 << 29, 1 << 30], jnp.uint32)
        plan = fine.table, fine.base, fine.layout, limits, jnp.array([1, 1])
        assert_same(sort_again(x, *plan), scatter_again(x, *plan))


def test_an_array_on_eight_devices_is_counted_where_it_lies() -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(sketch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_processes_find_what_one_does() -> None:
    alone, *others = [found for count in (1, 2, 4) for found in _of_processes(count)]
    for found in others:
        assert found["sketch"] == alone["sketch"]
        for ours, theirs in zip(found["report"], alone["report"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def _of_processes(count: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("distributed.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(count), str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    done = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), done
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


def test_a_second_pass_runs_in_64_bit(x64: None) -> None:
    x = np.float32(1) + np.arange(1000, dtype=np.float32) * np.float32(2**-20)
    assert_certified(summarize_array(x), drawn.exact(x), "uniform")
