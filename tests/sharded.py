"""Run by test_sketch.py in a process with eight devices: sketches and reports of sharded weights."""

import re

import drawn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import placed

import jaxeff
from jaxeff.metrics.sketch import count, summarize

SPECS = {
    "columns": P(None, "b"),
    "in one": P(("a", "b")),
    "both": P("a", "b"),
}
COPYING = ("all-gather", "all-to-all", "collective-permute")


def assert_same(a, b) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


def main() -> None:
    assert len(jax.devices()) == 8
    automatic = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = drawn.draw("clusters", 0, 2**16).reshape(512, 128)
    alone = count(x)
    want = summarize(alone)
    for mesh in (automatic, explicit):
        for name, spec in SPECS.items():
            lying = jax.device_put(x, NamedSharding(mesh, spec))
            program = count.lower(lying).compile()
            assert not any(word in program.as_text() for word in COPYING), (mesh, name)
            assert_same(program(lying), alone)
        assert_same(summarize(count(lying)), want)

    def of_part(part: jax.Array):
        return jax.tree.map(lambda leaf: leaf[None], count(part))

    parts = jax.shard_map(of_part, mesh=automatic, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    each = parts(jax.device_put(x, NamedSharding(automatic, P("a"))))
    for index, rows in enumerate(np.split(x, 4)):
        assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], each), count(rows))

    large = jax.ShapeDtypeStruct((2**12, 2**12), jnp.float32, sharding=NamedSharding(automatic, P("a", "b")))
    program = count.lower(large).compile()
    assert program.memory_analysis().temp_size_in_bytes < 64e6
    assert not any(word in program.as_text() for word in COPYING)
    reports(automatic)
    blocks(automatic)
    if jax.__version_info__ >= (0, 10):
        with jax.set_mesh(explicit):
            reports(explicit)


def reports(mesh: jax.sharding.Mesh) -> None:
    """Nothing is gathered but what the forward gathers itself, and small rows of the noise beside a layer."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {"a": (64, 512), "b": (512, 512), "c": (512, 512), "d": (512, 1024)}
    params = {name: draw(shape, np.float32) for name, shape in shapes.items()}
    batch = draw((16, 64), np.float32)

    def apply_fn(params, x):
        for weight in params.values():
            x = placed(jax.nn.relu(x @ weight), "a")
        return x

    lying = {name: jax.device_put(w, NamedSharding(mesh, P("a", "b"))) for name, w in params.items()}
    parts = jax.device_put(batch, NamedSharding(mesh, P("a")))
    alone = jaxeff.analyze(params, apply_fn, batch)
    program = jax.jit(lambda params, batch: jaxeff.analyze(params, apply_fn, batch))
    program = program.lower(lying, parts).compile()
    for report in (program(lying, parts), jaxeff.analyze(lying, apply_fn, parts)):
        for ours, theirs in zip(report.layers.values(), alone.layers.values(), strict=True):
            np.testing.assert_allclose(ours.metrics.gini, theirs.metrics.gini, rtol=1e-5)
            np.testing.assert_allclose(ours.metrics.utilization, theirs.metrics.utilization, rtol=1e-5)
            np.testing.assert_allclose(ours.effective_units, theirs.effective_units, rtol=1e-5)
            assert int(ours.metrics.zeros) == int(theirs.metrics.zeros)
    forward = gathered(jax.jit(apply_fn).lower(lying, parts).compile().as_text())
    assert len(gathered(program.as_text())) <= len(forward), (gathered(program.as_text()), forward)


def blocks(mesh: jax.sharding.Mesh) -> None:
    """Layers of one shape that lie in different ways, as the matrices into a block and out of it: none moves."""
    spec = {"into": P(None, "a", "b"), "out": P(None, "b", "a")}
    shape = (3, 256, 256)
    stacks = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, own))
        for name, own in spec.items()
    }
    listed = {
        f"block{i}/{name}": jax.ShapeDtypeStruct(
            shape[1:], jnp.float32, sharding=NamedSharding(mesh, P(*own[1:]))
        )
        for i in range(shape[0])
        for name, own in spec.items()
    }
    batch = jax.ShapeDtypeStruct((16, 256), jnp.float32, sharding=NamedSharding(mesh, P("a")))

    def block(x, p):
        x = jax.lax.with_sharding_constraint(x, batch.sharding)
        return x + jax.nn.relu(x @ p["into"]) @ p["out"], None

    def scanned(params, x):
        return jax.lax.scan(block, x, params)[0]

    def unrolled(params, x):
        for i in range(shape[0]):
            x, _ = block(x, {name: params[f"block{i}/{name}"] for name in spec})
        return x

    automatic = {f"Dense_{i}/kernel": leaf for i, leaf in enumerate(listed.values())}

    def dense(params, x):
        return unrolled(dict(zip(listed, params.values(), strict=True)), x)

    for params, apply_fn in ((stacks, scanned), (listed, unrolled), (automatic, dense)):
        assert gathered(jax.jit(jaxeff.analyze).lower(params).compile().as_text()) == []
        forward = gathered(jax.jit(apply_fn).lower(params, batch).compile().as_text())
        report = jax.jit(lambda params, batch, apply_fn=apply_fn: jaxeff.analyze(params, apply_fn, batch))
        found = gathered(report.lower(params, batch).compile().as_text())
        assert len(found) <= len(forward), (found, forward)


def gathered(program: str) -> list[str]:
    """Shapes of what is gathered or moved, of the size of a layer's weights."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{'|'.join(COPYING)})(?:-start)?\(", program)
    return [shape for shape in found if np.prod([int(side) for side in shape.split(",")]) > 2**14]


if __name__ == "__main__":
    main()
