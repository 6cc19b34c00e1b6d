"""Run by test_meshes.py in a process with four devices: every public entry point on sharded arrays.

A table: entry points x two networks x layouts of their arrays x modes of the mesh. Expected is what each
gives on one device.
"""

import contextlib
import dataclasses
import functools
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxeff
from jaxeff import cost, importance, prune

LAYOUTS = ("rows", "columns", "both", "batch")
"""What lies in parts beside the batch: the inputs of every weight, its outputs, both, or nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """What the entry points are called with.

    Attributes:
        axes: like the params, a letter for each axis: i for inputs, o for outputs.
        criteria: what statistics are collected for.
    """

    params: Any
    axes: Any
    apply_fn: Callable[..., Any]
    batches: tuple[Any, Any]
    targets: tuple[Any, Any]
    criteria: tuple[str, ...]


def loss_fn(outputs: Any, targets: Any) -> Any:
    return jnp.mean(jnp.square(outputs - targets), tuple(range(1, outputs.ndim)))


def explicit(array: Any) -> bool:
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def placed(array: Any, *spec: Any) -> Any:
    """As a model written for explicit sharding lays its arrays out; elsewhere the compiler chooses."""
    if not explicit(array):
        return array
    mesh = jax.typeof(array).sharding.mesh
    # A batch of one, which a criterion of single examples makes, cannot be cut.
    entries = (name if size % 2 == 0 else None for name, size in zip(spec, array.shape, strict=False))
    return jax.sharding.reshard(array, NamedSharding(mesh, P(*entries)))


def perceptron() -> Network:
    """Two layers; each weight's inputs are brought together for its product, as in fully sharded training."""
    draw = np.random.default_rng(0).standard_normal
    params = {
        "a": {"kernel": draw((8, 16)), "bias": draw(16)},
        "b": {"kernel": draw((16, 8)), "bias": draw(8)},
    }
    axes = {"a": {"kernel": "io", "bias": "o"}, "b": {"kernel": "io", "bias": "o"}}

    def apply_fn(params: Any, x: Any) -> Any:
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        return placed(hidden, "data") @ params["b"]["kernel"] + params["b"]["bias"]

    batches = tuple(jnp.asarray(draw((8, 8)), jnp.float32) for _ in range(2))
    targets = tuple(jnp.asarray(draw((8, 8)), jnp.float32) for _ in range(2))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return Network(params, axes, apply_fn, batches, targets, tuple(importance.CRITERIA))


def transformer() -> Network:
    """Two scanned blocks of attention and a gated layer; weights are gathered before they are used."""
    layers, width, heads, size, tokens = 2, 8, 2, 4, 16
    draw = np.random.default_rng(1).standard_normal
    attention = {name: draw((layers, width, heads, size)) for name in ("q", "k", "v")}
    attention["o"] = draw((layers, heads, size, width))
    params = {
        "embedding": draw((tokens, width)),
        "blocks": attention | {"up": draw((layers, width, 16)), "down": draw((layers, 16, width))},
        "head": draw((width, 8)),
    }
    axes = {
        "embedding": "io",
        "blocks": {
            **dict.fromkeys("qkv", ".io."),
            "o": ".i.o",
            "up": ".io",
            "down": ".io",
        },
        "head": "io",
    }

    def block(x: Any, w: Any) -> tuple[Any, None]:
        # Each is gathered where it is used, in the order of use that one device has.
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
        q, k, v = (jnp.einsum("btd,dhk->bthk", normed, placed(w[name])) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2)
        x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, placed(w["o"]))
        return x + jax.nn.gelu(x @ placed(w["up"])) @ placed(w["down"]), None

    def apply_fn(params: Any, numbers: Any) -> Any:
        table = placed(params["embedding"])
        parts = P("data" if len(numbers) % 2 == 0 else None)
        rows = {"out_sharding": parts} if explicit(numbers) else {}
        x = table.at[numbers].get(**rows)
        x, _ = jax.lax.scan(block, x, params["blocks"])
        return x @ placed(params["head"])

    draw_tokens = np.random.default_rng(2).integers
    batches = tuple(jnp.asarray(draw_tokens(0, tokens, (4, 4)), jnp.int32) for _ in range(2))
    targets = tuple(jnp.asarray(draw((4, 4, 8)), jnp.float32) for _ in range(2))
    params = jax.tree.map(lambda x: jnp.asarray(x / 2, jnp.float32), params)
    # No Hessians: they take a minute to run on several devices of one processor.
    criteria = ("activation", "wanda", "random", "filter_norm", "taylor", "unit_taylor", "fisher", "lrp")
    return Network(params, axes, apply_fn, batches, targets, criteria)


NETWORKS = {"perceptron": perceptron, "transformer": transformer}


def laid_out(network: Network, mesh: Mesh, layout: str) -> Network:
    letters = {"rows": "i", "columns": "o", "both": "io", "batch": ""}[layout]
    # With both, the inputs share the batch's axis of the mesh, as in fully sharded training.
    names = {"i": "data" if layout == "both" else "model", "o": "model"}

    def lay(array: Any, axes: str) -> Any:
        spec = P(*(names[letter] if letter in letters else None for letter in axes))
        return jax.device_put(array, NamedSharding(mesh, spec))

    parts = NamedSharding(mesh, P("data"))
    return dataclasses.replace(
        network,
        params=jax.tree.map(lay, network.params, network.axes),
        batches=jax.device_put(network.batches, parts),
        targets=jax.device_put(network.targets, parts),
    )


# The entry points


Row = Callable[[Network], Any]


@functools.lru_cache(maxsize=2)
def collected(net: Network) -> Any:
    loss = {"loss_fn": loss_fn, "targets": net.targets[0]}
    return jaxeff.collect(net.params, net.apply_fn, net.batches[0], criterion=net.criteria, **loss)


def scores(criterion: str, net: Network, **options: Any) -> Any:
    if criterion not in net.criteria:
        return None
    return importance.scores(net.params, collected(net), criterion, **options)


def calibrated(net: Network) -> Any:
    pairs = [*zip(net.batches, net.targets, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return jaxeff.calibrate(
            net.params, net.apply_fn, pairs, criterion=("wanda", "taylor"), loss_fn=loss_fn
        )


def merged(net: Network) -> Any:
    return jaxeff.merge(*(jaxeff.collect(net.params, net.apply_fn, batch) for batch in net.batches))


def masked(net: Network, *args: Any, **options: Any) -> Any:
    also = {"embedding": True} if "embedding" in net.params else {}
    layout = prune.layout(net.params, net.apply_fn, net.batches[0], prunable=also)
    return prune.masks(prune.scored(net.params, prunable=layout), *args, **options)


def gradients(net: Network, params: Any) -> Any:
    return jax.grad(lambda p: jnp.mean(loss_fn(net.apply_fn(p, net.batches[0]), net.targets[0])))(params)


def trained(optimizer: Any, net: Network, *, steps: int = 3) -> Any:
    """The params and the whole state after some compiled steps."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(gradients(net, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = net.params, optimizer.init(net.params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def sparsified(net: Network, **options: Any) -> Any:
    return trained(prune.sparsify(optax.adam(0.01), prune.cubic(0.5, 0, 2, 1), **options), net)


def dynamic(recipe: Any, net: Network) -> Any:
    return trained(recipe(optax.adam(0.01), 0.5, key=jax.random.key(0), end=10, every=1), net)


def shrunk(net: Network) -> Any:
    groups = prune.groups(net.params, net.apply_fn, net.batches[0])
    plan = prune.plan(groups, prune.scored(net.params, prunable=lambda path, leaf: leaf.ndim > 1), 0.5)
    state = optax.adam(0.1).init(net.params)
    return plan.sizes(), prune.shrink(net.params, plan, state), plan.masks(net.params)


def fluctuating(net: Network) -> Any:
    groups = prune.groups(net.params, net.apply_fn, net.batches[0])
    found = prune.fluctuation(net.params, net.apply_fn, net.batches[0])
    plan = prune.plan(groups, found.importance, 0.25, kinds=("unit",))
    has_biases = any(reader.bias for reader in found.readers.values())
    return found.importance, found.compensated(net.params, plan) if has_biases else None


def repaired(net: Network, way: str) -> Any:
    statistics = jaxeff.collect(net.params, net.apply_fn, net.batches[0], criterion="wanda", hessians=True)
    whole = {"embedding": False} if "embedding" in net.params else {}
    scores = prune.scored(net.params, statistics, "wanda", prunable=whole)
    if way == "sparsegpt":
        return prune.sparsegpt(net.params, statistics, 0.5, prunable=whole)
    if way == "reconstruct":
        return prune.reconstruct(net.params, prune.masks(scores, 0.5, scope="unit"), statistics)
    return prune.masks(scores, 0.5, scope="unit", allocation=prune.owl(scores, 0.5))


def in_turn(net: Network) -> Any:
    def half(params: Any, statistics: Any) -> Any:
        masks = prune.masks(prune.scored(params, statistics, "wanda"), 0.5, scope="unit")
        return prune.apply(params, masks), masks

    return prune.block_by_block(net.params, net.apply_fn, [*net.batches], half)


def sensitivities(net: Network, **options: Any) -> Any:
    found = prune.sensitivity(
        net.params,
        net.apply_fn,
        net.batches[0],
        targets=net.targets[0],
        loss_fn=loss_fn,
        sparsities=(0.5, 0.75),
        **options,
    )
    return found.losses, found.dense, found.allocation(0.5)


def pathed(net: Network) -> Any:
    report = jaxeff.analyze(net.params, net.apply_fn, net.batches[0])
    groups = prune.groups(net.params, net.apply_fn, net.batches[0])
    found = jaxeff.pathways(report, groups, prune.scored(net.params), count=3)
    return [(route.units, route.strength) for route in found.routes]


class State(NamedTuple):
    params: Any
    opt_state: Any
    apply_fn: Any = None


def recipe(which: Any, net: Network, **options: Any) -> Any:
    optimizer = optax.sgd(0.01)

    @jax.jit
    def step(state: State, batch: Any) -> State:
        updates, inner = optimizer.update(gradients(net, state.params), state.opt_state)
        return State(optax.apply_updates(state.params, updates), inner)

    def evaluate(state: State) -> Any:
        return -jnp.mean(loss_fn(net.apply_fn(state.params, net.batches[0]), net.targets[0]))

    state = State(net.params, optimizer.init(net.params))
    pairs = [*zip(net.batches, net.targets, strict=True)]
    pruned = which(state, step, pairs, evaluate, sparsity=0.5, steps=2, progress=False, **options)
    return pruned.state, pruned.masks, pruned.dense


def monitored(net: Network) -> Any:
    watch = jaxeff.monitor(every=1, report_every=1, spectra=True)

    def step(state: Any, params: Any, batch: Any) -> Any:
        trees = {"gradients": jax.tree.map(jnp.sin, params), "updates": jax.tree.map(jnp.cos, params)}
        return watch.update(state, params, net.apply_fn, batch, **trees)

    state = watch.init(net.params, net.apply_fn, net.batches[0])
    state = jax.jit(step)(state, net.params, net.batches[0])
    # Apart, since the state packs small numbers with large ones.
    return state.report, state.vitals, state.first, state.ranks


def compared(net: Network, scope: str) -> Any:
    criteria = ("magnitude", "wanda", "taylor")
    fractions = (0.0, 0.5, 1.0)
    batch, targets = net.batches[0], net.targets[0]
    return jaxeff.compare_criteria(
        net.params,
        net.apply_fn,
        batch,
        targets=targets,
        loss_fn=loss_fn,
        criteria=criteria,
        fractions=fractions,
        scope=scope,
    )


def counted(net: Network) -> Any:
    found = cost.count(net.params, net.apply_fn, net.batches[0])
    return found.macs, found.flops


METRICS: dict[str, Callable[[jax.Array], Any]] = {
    **{name: getattr(jaxeff.metrics, name) for name in ("summarize", "entropy", "gini")},
    "coverage": lambda x: jaxeff.metrics.coverage(x, 0.8),
    "sparsity": lambda x: jaxeff.metrics.sparsity(x, 0.1),
    "relative_sparsity": lambda x: jaxeff.metrics.relative_sparsity(x, 0.5),
    "sketch": lambda x: jaxeff.sketch.summarize(jaxeff.sketch.count(x))[0],
}

ROWS: dict[str, Row] = {
    "collect": collected,
    **{f"scores by {name}": functools.partial(scores, name) for name in importance.CRITERIA},
    "scores of units": functools.partial(scores, "wanda", level="unit"),
    "scores of heads": functools.partial(scores, "wanda", level="head", reduction="max"),
    "scores of layers": functools.partial(scores, "wanda", level="layer", reduction="l2"),
    "calibrate": calibrated,
    "merge": merged,
    "compare_criteria": functools.partial(compared, scope="global"),
    "compare_criteria by layer": functools.partial(compared, scope="layer"),
    "masks by layer": lambda net: masked(net, 0.5),
    "masks of each unit": lambda net: masked(net, 0.5, scope="unit"),
    "masks of all": lambda net: masked(net, 0.5, scope="global"),
    "masks of all, at most": lambda net: masked(net, 0.5, scope="global", max_sparsity=0.6),
    "masks by ERK": lambda net: masked(net, 0.5, allocation="erk"),
    "masks by LAMP": lambda net: masked(net, 0.5, scope="global", allocation="lamp"),
    "masks of blocks": lambda net: masked(net, 0.5, pattern=prune.Block((2, 2))),
    "masks of units": lambda net: masked(net, 0.5, pattern=prune.Units()),
    "masks of 1 in 2": lambda net: masked(net, pattern=prune.NByM(1, 2)),
    "masks of 2 in 4": lambda net: masked(net, pattern=prune.NByM(2, 4, axis="output")),
    "apply": lambda net: prune.apply(net.params, masked(net, 0.5)),
    "straight_through": lambda net: jax.jit(prune.straight_through)(net.params, masked(net, 0.5)),
    "pack": lambda net: prune.unpack(prune.pack(masked(net, 0.5))),
    "sparsity": lambda net: prune.sparsity(masked(net, 0.5)),
    "sensitivity": sensitivities,
    "sensitivity of blocks": functools.partial(sensitivities, pattern=prune.Block((2, 2))),
    "sensitivity of units": functools.partial(sensitivities, pattern=prune.Units()),
    "shrink": shrunk,
    "fluctuation": fluctuating,
    "sparsegpt": functools.partial(repaired, way="sparsegpt"),
    "reconstruct": functools.partial(repaired, way="reconstruct"),
    "masks by OWL": functools.partial(repaired, way="owl"),
    "block_by_block": in_turn,
    "cost.count": counted,
    "cost.memory": lambda net: cost.memory(net.params, net.apply_fn, net.batches[0]).parameter_bytes,
    "sparsify": sparsified,
    "sparsify blocks": functools.partial(sparsified, pattern=prune.Block((2, 2))),
    "sparsify by LAMP": functools.partial(sparsified, scope="global", allocation="lamp"),
    "rigl": functools.partial(dynamic, prune.rigl),
    "sparse_evolution": functools.partial(dynamic, prune.sparse_evolution),
    "iterative_magnitude": functools.partial(recipe, prune.iterative_magnitude, rounds=1),
    "lottery_ticket": functools.partial(recipe, prune.lottery_ticket, rounds=1),
    "gradual": functools.partial(recipe, prune.gradual, fine_tune=1, every=1),
    "analyze": lambda net: jaxeff.analyze(net.params, net.apply_fn, net.batches[0]),
    "analyze of weights": lambda net: jaxeff.analyze(net.params),
    "metrics": lambda net: {
        name: jax.tree.map(lambda leaf, metric=metric: metric(jnp.abs(leaf)), net.params)
        for name, metric in METRICS.items()
    },
    "monitor": monitored,
    "pathways": pathed,
    "add_entropy_gradient": lambda net: trained(
        optax.chain(prune.add_entropy_gradient(0.1), optax.sgd(0.1)), net
    ),
}

OF_BLOCKS = (
    "collect", *(name for name in ROWS if name.startswith("scores")), "calibrate", "merge",
    "compare_criteria by layer", "masks by layer", "masks of each unit", "masks by LAMP", "masks of blocks",
    "masks of 2 in 4", "sensitivity", "shrink", "fluctuation", "sparsegpt", "reconstruct",
    "masks by OWL", "block_by_block", "cost.count", "sparsify", "rigl", "analyze",
)  # fmt: skip
"""Rows of the transformer: those to which stacked blocks matter."""


IN_BOTH = (
    "analyze of weights", "monitor", "pathways", "add_entropy_gradient", "iterative_magnitude",
    "lottery_ticket", "gradual", "sparsegpt", "reconstruct", "masks by OWL", "fluctuation",
    "sensitivity of blocks", "sensitivity of units", "sparsify by LAMP",
)  # fmt: skip
"""Rows of the perceptron in the layout of both alone: made of others, or long to compile."""


def cells() -> Iterator[tuple[str, str, str]]:
    """Each network, mode and layout of the table."""
    # Older versions of jax lack much of what explicit axes need.
    modes = ("Auto", "Explicit") if jax.__version_info__ >= (0, 10) else ("Auto",)
    for mode in modes:
        yield from (("perceptron", mode, layout) for layout in LAYOUTS)
        yield "transformer", mode, "both"


def rows_of(network: str, layout: str) -> tuple[str, ...]:
    if network == "transformer":
        return OF_BLOCKS
    return tuple(row for row in ROWS if row != "block_by_block" and (layout == "both" or row not in IN_BOTH))


def assert_equal(found: Any, expected: Any) -> None:
    found, expected = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (found, expected))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, ours), (_, theirs) in zip(found, expected, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        # Sums go in another order: what cancels is good to the size of the terms.
        size = np.max(np.abs(theirs), initial=0, where=np.isfinite(theirs)) if theirs.dtype != bool else 0
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, 1e-4, 1e-5 * float(size), err_msg=where)


def main() -> None:
    """Print a line for each row of each cell: None, or what went wrong."""
    networks = {name: make() for name, make in NETWORKS.items()}
    alone: dict[tuple[str, str], Any] = {}
    for network, mode, layout in cells():
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType[mode],) * 2)
        lying = laid_out(networks[network], mesh, layout)
        for row in rows_of(network, layout):
            if (network, row) not in alone:
                alone[network, row] = ROWS[row](networks[network])
            failure = None
            try:
                with jax.set_mesh(mesh) if mode == "Explicit" else contextlib.nullcontext():
                    found = ROWS[row](lying)
                assert_equal(found, alone[network, row])
            except Exception:  # Every cell is reported, whatever went wrong in it.
                failure = traceback.format_exc()
            print(json.dumps([row, [network, mode, layout], failure]), flush=True)


if __name__ == "__main__":
    main()
