"""Both ways to exactly so many of the lowest, against a stable sort: whole arrays, and pieces on one CPU."""

import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxeff
from jaxeff import prune
from jaxeff.numerics import selection
from jaxeff.numerics.bisection import Wide, bisected_of_many, index_in_row, is_below, pattern

DRAW = np.random.default_rng(0)
# Shape of the rows, how many values, so that more or less is tied: rows of one piece, of several with and
# without a rest, of more than the 64 that share wide histograms, short ones of more than one run.
ROWS = {
    "one short": (1, 1, 3),
    "short": (5, 300, 4),
    "many short": (700, 1000, 50),
    "one piece, all tied": (4, 1 << 14, 1),
    "a rest": (2, (1 << 14) + 1, 10**6),
    "pieces": (3, 50_000, 7),
    "many long": (70, 20_000, 1000),
}


def oracle(rows, counts, largest=False, among=None):
    """The lowest of each row, equal ones by index."""
    found = np.zeros(rows.shape, bool)
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        order = np.argsort(-row if largest else row, kind="stable")
        found[i, (order if among is None else order[among[i][order]])[:count]] = True
    return found


@pytest.fixture(params=["pieces", "whole"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(selection, "_on_one_cpu", lambda arrays: request.param == "pieces")
    return request.param


@pytest.mark.parametrize(("rows", "size", "values"), ROWS.values(), ids=ROWS)
def test_the_lowest_of_each_row_and_of_all(rows, size, values):
    scores = DRAW.integers(0, values, (rows, size)).astype(np.float32)
    counts = DRAW.integers(0, size + 1, rows)
    counts[0], counts[-1] = size, 0
    (found,) = selection.lowest_of_each([jnp.asarray(scores)], [counts], [(0,)])
    np.testing.assert_array_equal(found, oracle(scores, counts))
    (found,) = selection.lowest_of_each([jnp.asarray(scores.T)], [counts], [(1,)])
    np.testing.assert_array_equal(found.T, oracle(scores, counts))
    for count in (0, 1, scores.size // 2, scores.size):
        parts = [jnp.asarray(part) for part in np.split(scores, [size // 3], axis=1)]
        found = selection.lowest(parts, count)
        flat = np.concatenate([np.ravel(part) for part in parts])
        expected = oracle(flat[None], [count])[0]
        np.testing.assert_array_equal(np.concatenate([np.ravel(part) for part in found]), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
@pytest.mark.parametrize("largest", [False, True], ids=["lowest", "highest"])
@pytest.mark.parametrize("size", [300, 20_000])
def test_candidates_of_any_dtype(dtype, largest, size):
    scores, among = DRAW.integers(0, 9, (7, size)), DRAW.random((7, size)) < 0.6
    counts = np.minimum(DRAW.integers(0, size, 7), among.sum(1))
    counts[0] = among[0].sum()
    choose = selection.highest_of_each if largest else selection.lowest_of_each
    (found,) = choose([jnp.asarray(scores, dtype)], [counts], [(0,)], [jnp.asarray(among)])
    np.testing.assert_array_equal(found, oracle(scores, counts, largest, among))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("count", [0, 1, 70_000, 131_071, 131_072, 200_000, 263_168])
def test_counts_in_two_words_select_what_counts_in_one_do(count, largest):
    # More than 2^16 in one array, so that both words count, and many ties.
    draw = np.random.default_rng(0).integers
    scores = [jnp.asarray(draw(9, size=size), jnp.float32) for size in ((512, 512), (1024,))]
    plain = selection.highest if largest else selection.lowest
    found = selection.of_many(largest, scores, Wide.of(count), None)
    for ours, expected in zip(found, plain(scores, count), strict=True):
        assert np.array_equal(ours, expected)


def test_ties_that_share_an_index_go_together():
    first, second = jnp.zeros((3, 7)), jnp.ones(4)
    assert index_in_row((3, 7), (), 3).tolist() == [
        [3 * row + at // 3 for at in range(7)] for row in range(3)
    ]
    threshold = bisected_of_many(
        [pattern(first), pattern(second)],
        [index_in_row((3, 7), (), 3), index_in_row((4,), (), 3) + 9],
        Wide.of(5),
    )
    # Three ties share the first index, and three the second, which do not all fit.
    gone = is_below(pattern(first), threshold, index_in_row((3, 7), (), 3))
    assert np.flatnonzero(gone).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 65_535, 65_536, 2**31, 3 * 2**33 + 5])
def test_two_words_hold_a_count(count):
    held = Wide.of(count)
    assert (int(held.upper) << 16) + int(held.lower) == count and 0 <= int(held.lower) < 2**16
    of_float = Wide.of(jnp.float32(count))
    assert (int(of_float.upper) << 16) + int(of_float.lower) == int(np.float32(count))
    less = held.minus(Wide.of(min(count, 70_001)))
    assert (int(less.upper) << 16) + int(less.lower) == count - min(count, 70_001)
    assert bool(less.at_most(held)) and (bool(held.at_most(less)) == (count == 0))


def test_two_words_count_many_rows():
    # The low bytes of all rows together pass 2^16 many times over.
    truths = jnp.arange(300)[None] < jnp.full((70_000, 1), 255)
    found = Wide.true_in([truths, jnp.ones(3, bool), jnp.zeros((0, 4), bool)])
    assert (int(found.upper) << 16) + int(found.lower) == 70_000 * 255 + 3


@pytest.mark.parametrize("other", [(5, 0), (1 << 20, 4096, 1)])
def test_many_scores_may_lie_in_any_shape(other):
    scores = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((80, 8192, 28672), other)]
    found = jax.eval_shape(lambda scores: selection.lowest(scores, 2**33), scores)
    assert [mask.shape for mask in found] == [(80, 8192, 28672), other]


@pytest.mark.parametrize("sparsity", [0.5, "traced"])
def test_a_model_of_many_billion_weights_has_masks_of_all_together(sparsity):
    # Llama 2 70B's largest leaves, which nothing is computed of.
    scores = {
        "up": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16),
        "norm": jax.ShapeDtypeStruct((8,), float),
    }
    share = jax.ShapeDtypeStruct((), jnp.float32) if sparsity == "traced" else None
    made = jax.jit(
        lambda scores, share: prune.masks(scores, sparsity if share is None else share, scope="global")
    )
    found = jax.eval_shape(made, scores, share)
    assert found["up"].shape == scores["up"].shape and found["up"].dtype == bool


def test_a_threshold_says_of_one_row_what_goes():
    scores, counts = DRAW.integers(0, 5, (3, 40)).astype(np.float32), np.array([0, 5, 40])
    found = selection.thresholds(jnp.asarray(scores), counts, (0,))
    for i, count in enumerate(counts):
        for row in range(3):
            threshold = jax.tree.map(lambda part, i=i, row=row: part[i, row], found)
            expected = np.zeros_like(scores, bool)
            expected[row] = oracle(scores, [count] * 3)[row]
            below = selection.below(jnp.asarray(scores), threshold, (0,), row)
            np.testing.assert_array_equal(below, expected)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_leaves_of_one_shape_share_what_is_compiled(scope, way):
    """XLA compiles equal kernels once: the distinct ones must not grow with the leaves."""
    if way == "whole":
        pytest.skip("whole arrays are each counted by a kernel of their own")

    def distinct(leaves):
        tree = {str(i): jax.ShapeDtypeStruct((64, 512), jnp.float32) for i in range(leaves)}
        text = (
            jax.jit(lambda tree: jaxeff.prune.masks(tree, 0.5, scope=scope)).lower(tree).compile().as_text()
        )
        fused = [part for part in text.split("\n\n") if part.startswith("%fused_computation")]
        # But for the names of computations and operands, and where each came from.
        return len({re.sub(r"(, metadata=\{.*)|%?[\w-]+\.\d+", "", part) for part in fused})

    few, many = distinct(4), distinct(24)
    assert many <= few + 4, (few, many)


_ON_EIGHT = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxeff import prune
from jaxeff.prune import Axes, Scores
scores = np.random.default_rng(0).integers(0, 50, (4, 16, 32)).astype(np.float32)
other = np.random.default_rng(1).integers(0, 50, (16, 8)).astype(np.float32)
axes = Axes((1,), (2,), (0,))
hows = [{"scope": scope} for scope in ("layer", "unit", "global")]
hows.append({"scope": "global", "max_sparsity": {"a[1]": 0.25}})
one = {"a": Scores(jnp.asarray(scores), axes), "kernel": other}
expected = [prune.masks(one, 0.7, **how) for how in hows]
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))
    for a, b in ((P(None, "d", "m"), P("d")), (P(None, None, "m"), P(None, "d")), (P("d"), P())):
        with jax.set_mesh(mesh):
            tree = {
                "a": Scores(jax.device_put(scores, NamedSharding(mesh, a)), axes),
                "kernel": jax.device_put(other, NamedSharding(mesh, b)),
            }
            for how, one in zip(hows, expected):
                run = lambda t: prune.masks(t, 0.7, **how)
                for run in (run, jax.jit(run)):
                    jax.tree.map(np.testing.assert_array_equal, run(tree), one)
"""


def test_blocks_and_units_on_eight_devices_are_those_of_one(way):
    if way == "pieces":
        pytest.skip("with eight devices arrays are taken whole")
    devices.run(_ON_EIGHT, 8)
