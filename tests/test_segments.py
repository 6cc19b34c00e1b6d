"""A program in segments computes what it computes whole, wherever it is cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import drawn, normal

from jaxeff import graph
from jaxeff.graph.segments import Segments, whole


class Network(nn.Module):
    """Remat, a loop, a custom derivative, a mask made of the batch, and a constant made without it."""

    @nn.compact
    def __call__(self, x):
        mask = jnp.sum(x, -1, keepdims=True) > 0
        bias = jnp.cumsum(jnp.ones((1, 4)), 1)
        for i in range(2):
            x = nn.remat(nn.Dense)(4, name=f"dense_{i}")(nn.relu(x) + bias)
        x, sums = jax.lax.scan(lambda x, y: (x + y, jnp.sum(x)), x, jnp.ones((3, *x.shape)))
        return jnp.where(mask, x, 0), nn.Dense(2)(x) + sums[0]


X = normal(5, 4)
VARIABLES = drawn(Network(), X)
PROGRAM = graph.flatten(jax.make_jaxpr(Network().apply)(VARIABLES, X))
LEAVES = len(jax.tree.leaves(VARIABLES))
SEGMENTS = Segments(PROGRAM, ["constant"] * LEAVES + ["batch"])


@pytest.mark.parametrize("cut", range(0, len(SEGMENTS.steps) + 1, 3))
def test_two_segments_are_the_whole(cut):
    arrays = dict(zip(PROGRAM.inputs, jax.tree.leaves((VARIABLES, X)), strict=True))
    for first, last in ((0, cut), (cut, len(SEGMENTS.steps))):
        segment = SEGMENTS.between(first, last)
        made, _ = graph.evaluate(segment, [arrays[value] for value in segment.inputs], graph.Hooks())
        arrays |= dict(zip(segment.outputs, made, strict=True))
        # Nothing but weights and what is live goes on.
        kept = {*PROGRAM.inputs[:LEAVES], *SEGMENTS.live(last)}
        arrays = {value: array for value, array in arrays.items() if value in kept}
    for output, expected in zip(PROGRAM.outputs, Network().apply(VARIABLES, X), strict=True):
        np.testing.assert_allclose(arrays[output], expected, rtol=1e-6, atol=1e-6)


def test_what_is_made_without_the_batch_is_no_step():
    assert not any(whole(step).name == "cumsum" for step in SEGMENTS.steps)
    assert any(
        operation.name == "cumsum" for operation in SEGMENTS.between(0, len(SEGMENTS.steps)).operations
    )


def test_the_narrowest_cut_leaves_the_fewest_elements():
    def size(position):
        return sum(np.prod(value.shape, dtype=int) for value in SEGMENTS.live(position))

    last = len(SEGMENTS.steps)
    found = SEGMENTS.narrowest(1, last - 1)
    least = min(map(size, range(1, last)))
    assert size(found) == least and all(size(later) > least for later in range(found + 1, last))
