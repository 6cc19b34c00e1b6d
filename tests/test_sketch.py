"""Sketches: bounds that hold, and the laws of merging, cutting, padding and sharding, to the bit."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import devices
import distributed
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.metrics import sketch
from jaxeff.metrics._histogram import histogram, histogram_in_chunks
from jaxeff.metrics.sketch import count, merge, on_host, summarize

LARGE = 100_003  # prime: no piece divides it


def counted(x: np.ndarray) -> sketch.Sketch:
    """Padded to LARGE float32s, so that arrays of all sizes share one program."""
    return count(jnp.asarray(np.pad(x.astype(np.float32), (0, LARGE - x.size))), x.size)


def fetched(whole: sketch.Sketch) -> sketch.Sketch:
    return jax.tree.map(np.asarray, whole)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_within_bounds(whole: sketch.Sketch, want: dict[str, float], label: str) -> None:
    """On the device, and on the host in float64."""
    for where, (found, bounds) in {"device": summarize(whole), "host": on_host(fetched(whole))}.items():
        for name, error in drawn.errors(found, want).items():
            bound = float(getattr(bounds, name))
            assert error <= bound, f"{label}, {where}: {name} is off by {error}, at most {bound} was promised"
        for name in ("zeros", "nonfinite", "size"):
            assert int(getattr(found, name)) == want[name], f"{label}, {where}: {name}"


# Bounds.


@pytest.mark.parametrize("size", [1, 2, 7, 1000, LARGE])
def test_no_metric_is_farther_off_than_its_bound(size: int) -> None:
    for name in drawn.DRAWS:
        for seed in range(1 if size == LARGE else 2):
            x = drawn.draw(name, seed, size)
            assert_within_bounds(counted(x), drawn.exact(x), f"{name} {seed} of {size}")


@pytest.mark.parametrize("size", [2**18 - 1, 2**18, 2**19 + 5])
def test_chunks_on_the_host_count_what_one_program_counts(size: int) -> None:
    x = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    # The largest place of one bin, so often that the places sum to more than a word.
    x[: size // 4 * 3] = np.nextafter(np.float32(1), np.float32(0))
    x[-9:] = 0, -0.0, 1e-42, np.nan, np.inf, -1, -np.inf, 1e-2, 1e-3
    _same_counts(x)
    # The largest is subnormal, then there is none.
    _same_counts(np.where(x > 1, np.float32(1e-40), np.minimum(x, 0)))
    _same_counts(np.full(size, -0.0, np.float32))


def _same_counts(x: np.ndarray) -> None:
    table, high, largest = histogram_in_chunks(x)
    expected = jax.jit(histogram)(x)
    np.testing.assert_array_equal(table, expected.table)
    np.testing.assert_array_equal(high, np.broadcast_to(expected.high, high.shape))
    assert largest == expected.largest


def test_bounds_are_small_where_no_bin_is_crowded() -> None:
    for name in ("uniform", "normal", "power"):
        _, bounds = summarize(counted(drawn.draw(name, 0, LARGE)))
        wide = {field: float(getattr(bounds, field)) for field in drawn.FIELDS}
        # A share of the weights is in the bin that a threshold or a coverage falls in.
        shares = [wide.pop(field) for field in (*drawn.COVERAGES, *drawn.THRESHOLDS)]
        assert max(shares) < 5e-3 and max(wide.values()) < 5e-5, (name, shares, wide)


def test_of_narrow_floats_every_weight_is_known() -> None:
    for kind in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        x = drawn.draw(kind, 0, 1000)
        found, _ = on_host(fetched(counted(x)))
        for name, error in drawn.errors(found, drawn.exact(x)).items():
            assert error <= 2e-7, (kind, name, error)


def test_a_mean_of_few_units_in_the_last_place_is_not_its_floor() -> None:
    x = np.repeat(np.arange(4, dtype=np.uint32), [5, 6, 8, 1]).view(np.float32)
    counts = counted(x)
    assert_within_bounds(counts, drawn.exact(x), "subnormals")
    for _ in range(28):  # more than 2^31 in one bin, and then more than 2^32
        counts = merge(counts, counts)
    assert_within_bounds(counts, exact_copies(x, 2**28), "more subnormals")


def test_half_of_the_sum_is_reached_also_where_the_mean_is_no_float() -> None:
    x = np.repeat(np.arange(3, dtype=np.uint32), [2, 2, 1]).view(np.float32)
    assert_within_bounds(counted(x), drawn.exact(x), "a tie")


# Merging.


@pytest.mark.parametrize("name", ["normal", "one bin", "bits", "subnormal and normal", "half zero"])
def test_merging_the_parts_gives_the_sketch_of_the_whole(name: str) -> None:
    x = drawn.draw(name, 0, LARGE)
    a, b, c = (counted(part) for part in np.split(x, [1000, 50_000]))
    whole = counted(x)
    assert_same(merge(merge(a, b), c), whole)
    assert_same(merge(a, merge(b, c)), whole)
    assert_same(merge(merge(c, a), b), whole)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, LARGE - 1), st.sampled_from(["wide", "clusters", "few"]))
def test_a_cut_anywhere_changes_no_bit(cut: int, name: str) -> None:
    x = drawn.draw(name, 0, LARGE)
    parts = counted(x[:cut]), counted(x[cut:])
    assert_same(merge(*parts), counted(x))


def test_merging_unlike_things_is_refused() -> None:
    whole = counted(np.ones(1))
    with pytest.raises(TypeError, match="`a` and `b` must be two sketches.*got Sketch and Metrics"):
        merge(whole, summarize(whole)[0])
    with pytest.raises(TypeError, match="`sketch` must be a Sketch.*got tuple"):
        summarize(summarize(whole))


def test_shape_order_and_padding_change_no_bit() -> None:
    x = drawn.draw("half zero", 0, LARGE)
    whole = counted(x)
    assert_same(count(x.reshape(1, LARGE)), whole)
    assert_same(counted(x[::-1]), whole)


def test_a_run_of_many_pieces_is_their_sum() -> None:
    # More than 2^24 weights, of which more than 2^18 in one bin: sums of places have two words.
    part = drawn.draw("one bin", 0, 2**14)
    whole = count(np.tile(part, 2**10 + 3))
    doubled = counted(part)
    thrice = merge(merge(doubled, doubled), doubled)
    for _ in range(10):
        doubled = merge(doubled, doubled)
    assert_same(whole, merge(doubled, thrice))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_other_dtypes_count_as_the_nearest_float32(dtype) -> None:
    x = np.random.default_rng(0).integers(0, 2**25, 1000).astype(dtype)
    assert_same(count(x), counted(x))


def test_float64_counts_as_the_nearest_float32(x64: None) -> None:
    x = np.random.default_rng(0).random(1000)
    whole = count(x)
    assert_same(whole, counted(x))
    assert_within_bounds(whole, drawn.exact(x.astype(np.float32)), "uniform")
    assert int(summarize(count(np.full(1000, 1e300)))[0].nonfinite) == 1000


def test_rows_of_a_loop_add_up_to_the_whole() -> None:
    x = jnp.asarray(drawn.draw("normal", 0, 1000)).reshape(10, 100)
    each = jax.jit(jax.vmap(count))(x, jnp.full(10, 100))
    first, others = (jax.tree.map(lambda leaf, at=at: leaf[at], each) for at in (0, slice(1, None)))
    total, _ = jax.lax.scan(lambda sum, part: (merge(sum, part), None), first, others)
    assert_same(total, counted(np.ravel(x)))


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


@pytest.mark.parametrize("doublings", [10, 22, 24, 30])
def test_copies_of_an_array_have_its_metrics_in_closed_form(doublings: int) -> None:
    # Up to 2^40 weights, all of them in one bin for the constant.
    for name in ("normal", "constant", "one bin", "ternary", "half zero", "bits", "smallest", "float16"):
        x = drawn.draw(name, 0, 1000)
        whole = counted(x)
        for _ in range(doublings):
            whole = merge(whole, whole)
        assert_within_bounds(whole, exact_copies(x, 2**doublings), f"{name} 2^{doublings} times")


def test_a_sketch_shows_how_many_weights_it_counts() -> None:
    whole = counted(np.float32([1, 2.5, 0]))
    assert str(whole) == "Sketch of 3 weights, the largest 2.5"
    for _ in range(32):
        whole = merge(whole, whole)
    assert str(whole) == "Sketch of 12,884,901,888 weights, the largest 2.5"
    assert str(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), whole)) == "Sketches [2]"


# What is no importance, and what is no layer.


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_an_invalid_importance_makes_every_metric_nan(bad: float) -> None:
    found, bounds = summarize(counted(np.float32([1, 0, bad, 2, bad, -0.0, 3])))
    assert all(math.isnan(getattr(found, name)) for name in drawn.FIELDS)
    assert (found.zeros, found.nonfinite, found.size) == (2, 2, 7)
    assert not any(dataclasses.astuple(bounds))


def test_an_array_of_zeros_stands_by_convention() -> None:
    whole = counted(np.zeros(7))
    assert_within_bounds(whole, drawn.exact(np.zeros(7)), "zeros")
    assert not any(dataclasses.astuple(summarize(whole)[1]))


def test_more_weights_than_one_pass_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="`x`.*merge"):
        jax.eval_shape(count, jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_no_implicit_promotion(dtype) -> None:
    layer, size = jax.ShapeDtypeStruct((20_000,), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(lambda x, size: summarize(merge(count(x, size), count(x))), layer, size)


def test_a_sketch_has_no_slope() -> None:
    x = jnp.asarray(drawn.draw("normal", 0, 1000))
    slope = jax.grad(lambda x: summarize(count(x))[0].entropy + x.sum())(x)
    np.testing.assert_array_equal(slope, np.ones_like(x))


def test_on_the_host_nothing_is_compiled(compilations) -> None:
    whole = fetched(counted(drawn.draw("normal", 0, 1000)))
    with compilations() as none:
        found, bounds = on_host(whole)
    assert none.count == 0
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((found, bounds)))


# On several devices and in several processes.


def test_an_array_on_eight_devices_is_counted_where_it_lies() -> None:
    devices.run(Path(__file__).with_name("sharded.py"), 8)


def test_several_processes_find_what_one_does() -> None:
    alone = distributed.found_by(jax.devices()[:1])
    for found in _of_processes(2):
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
