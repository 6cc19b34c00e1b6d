"""Sharded arrays give what one device gives, whether the axes of their mesh are explicit or not."""

import json
from pathlib import Path
from typing import Any

import devices
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxeff

pytestmark = pytest.mark.slow

Table = dict[str, dict[tuple[str, ...], str | None]]


@pytest.fixture(scope="module")
def table() -> Table:
    """By row and cell what went wrong, of one process with four devices."""
    lines = devices.run(Path(__file__).with_name("meshes.py"), 4).splitlines()
    found: Table = {row: {} for row in meshes.ROWS}
    for line in lines:
        row, cell, failure = json.loads(line)
        found[row][tuple(cell)] = failure
    return found


@pytest.mark.parametrize("row", meshes.ROWS)
def test_sharded_arrays_give_what_one_device_gives(row: str, table: Table) -> None:
    expected = {cell for cell in meshes.cells() if row in meshes.rows_of(cell[0], cell[2])}
    assert table[row].keys() == expected
    assert not {cell: failure for cell, failure in table[row].items() if failure is not None}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older versions lack much of explicit axes")
def test_a_weight_laid_out_anew_or_by_the_compiler_keeps_its_activations() -> None:
    """relu of x w: x is [1, 2] and [3, 4], w has columns [1, 0] and [-1, -1]: units emit 1 and 3, and 0."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    weight = jnp.array([[1.0, -1.0], [0.0, -1.0]])
    batch = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def anew(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ jax.sharding.reshard(params["w"], P("x")))

    def by_compiler(params: Any, x: Any) -> Any:
        return jax.sharding.auto_axes(lambda w, x: jax.nn.relu(x @ w), out_sharding=P())(params["w"], x)

    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(weight, NamedSharding(mesh, P(None, "x")))}
        for apply_fn in (anew, by_compiler):
            (site,) = jaxeff.collect(params, apply_fn, batch).sites
            assert (site.kind, site.nonlinearity) == ("dense", "relu")
            np.testing.assert_array_equal(site.post.mean_absolute, [[2.0, 0.0]])
            np.testing.assert_array_equal(site.input.mean_absolute, [[2.0], [3.0]])
