"""Run by test_outliers.py in a process with eight devices: outliers and recycling of sharded weights and batches."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import placed

import jaxeff
from jaxeff import prune
from jaxeff.quantization import _weights


def model(params, x):
    hidden = jax.nn.relu(x @ placed(params["a"]) + placed(params["bias"])[None])
    return placed(hidden, "rows") @ placed(params["b"])


def numbers(found):
    each = [(row.weight, row.inputs) for row in found]
    return [
        [
            *vars(weight).values(),
            inputs.largest,
            inputs.median,
            inputs.kurtosis,
            inputs.zeros,
            inputs.int8,
            inputs.fp8,
        ]
        for weight, inputs in each
    ]


def recycled(params, x):
    report = jaxeff.analyze(params, model, x)
    state = jax.tree.map(jnp.ones_like, optax.adam(0.1).init(params))
    groups = prune.groups(params, model, x)
    return prune.recycle(params, groups, report, state, tau=0.0, key=jax.random.key(0))


def main() -> None:
    assert len(jax.devices()) == 8
    draw = np.random.default_rng(0).standard_normal
    params = {
        "a": draw((8, 16), np.float32),
        "bias": np.zeros(16, np.float32),
        "b": draw((16, 8), np.float32),
    }
    params["bias"][[2, 9]] = -100
    x = draw((32, 8), np.float32)
    alone = jaxeff.outliers(params, model, x)
    anew = recycled(params, x)
    assert anew.units["a:1"].tolist() == [2, 9]
    modes = ("Auto", "Explicit") if jax.__version_info__ >= (0, 10) else ("Auto",)
    _weights._LARGE = 8  # So that the device measures these too.
    for mode in modes:
        mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType[mode],) * 2)
        lay = lambda array, *spec, mesh=mesh: jax.device_put(array, NamedSharding(mesh, P(*spec)))  # noqa: E731
        specs = {"a": ("rows", "columns"), "bias": ("columns",), "b": ("columns", "rows")}
        lying = {name: lay(leaf, *specs[name]) for name, leaf in params.items()}
        with jax.set_mesh(mesh) if mode == "Explicit" else contextlib.nullcontext():
            found = jaxeff.outliers(lying, model, lay(x, "rows"))
            np.testing.assert_allclose(numbers(found), numbers(alone), rtol=1e-5)
            for ours, theirs in zip(found, alone, strict=True):
                np.testing.assert_array_equal(ours.inputs.counts.sum(), theirs.inputs.counts.sum())
                np.testing.assert_allclose(ours.inputs.channels, theirs.inputs.channels, rtol=1e-5)
            again = recycled(lying, lay(x, "rows"))
        for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(anew), strict=True):
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6)
        for name, leaf in again.params.items():
            assert leaf.sharding.is_equivalent_to(lying[name].sharding, leaf.ndim), (
                mode,
                name,
                leaf.sharding,
            )


if __name__ == "__main__":
    main()
