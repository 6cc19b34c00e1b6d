"""Both ways to exactly so many of the lowest, against a stable sort: whole arrays, and pieces on one CPU."""

import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxeff
from jaxeff.numerics import selection

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
