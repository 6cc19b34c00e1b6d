"""What the units of a model emit on a batch: sums, reduced where the activations are made.

In: `params`, `apply_fn`, `batch`. Out: `Statistics`: for every site of every weight the sums over
its input, pre- and post-activation, one number a unit; and a place for every leaf of `params`. The
activations themselves are never kept. Sums of two batches add. Imports `models` and `graph`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import graph, models
from jaxeff.graph import axes
from jaxeff.graph.axes import Dims
from jaxeff.graph.program import Value
from jaxeff.precision import widened

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnitStatistics:
    """Sums over everything that each unit emitted, in float32.

    Shapes broadcast against the weight: a (768, 3072) kernel has (1, 3072) for its outputs and
    (768, 1) for its inputs. `count`, how many values each sum holds, is a scalar.
    """

    absolute_sum: jax.Array
    square_sum: jax.Array
    maximum: jax.Array
    zeros: jax.Array
    count: jax.Array

    @property
    def mean_absolute(self) -> jax.Array:
        """mean |a|; 0 where nothing was seen."""
        return self.absolute_sum / jnp.maximum(self.count, 1)

    @property
    def rms(self) -> jax.Array:
        """sqrt(mean a^2)."""
        return jnp.sqrt(self.square_sum / jnp.maximum(self.count, 1))

    @property
    def zero_fraction(self) -> jax.Array:
        """The fraction of values that are exactly 0."""
        return self.zeros / jnp.maximum(self.count, 1)

    def __add__(self, other: UnitStatistics) -> UnitStatistics:
        return UnitStatistics(
            self.absolute_sum + other.absolute_sum,
            self.square_sum + other.square_sum,
            jnp.maximum(self.maximum, other.maximum),
            self.zeros + other.zeros,
            self.count + other.count,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteStatistics:
    """One use of one weight.

    Attributes:
        path: of the weight.
        kind: 'dense', 'conv' or 'embedding'.
        nonlinearity: what stands between pre- and post-activation; 'identity' for nothing.
        bias: path of the bias that the pre-activation includes, or None.
        unit_axes, input_axes: axes of the weight that index its outputs, and what it multiplies.
        layer_axes: axes over which the weight stacks layers that a scan runs through.
        macs: multiply-accumulates per example; None where the batch has no leading axis to divide by.
        input, pre, post: what the weight multiplies and what its units emit before and after the
            nonlinearity. The input of an embedding is the one-hot row of each token.
    """

    path: str = dataclasses.field(metadata=_STATIC)
    kind: str = dataclasses.field(metadata=_STATIC)
    nonlinearity: str = dataclasses.field(metadata=_STATIC)
    bias: str | None = dataclasses.field(metadata=_STATIC)
    unit_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    input_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    layer_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    macs: int | None = dataclasses.field(metadata=_STATIC)
    input: UnitStatistics
    pre: UnitStatistics
    post: UnitStatistics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModuleStatistics:
    """The outputs that Flax captured of one module; the units are the last axis."""

    path: str = dataclasses.field(metadata=_STATIC)
    output: UnitStatistics


@dataclasses.dataclass(frozen=True)
class Place:
    """What one leaf of `params` is.

    Attributes:
        role: 'weight', or what it is instead: 'bias', 'scale', 'integer array', ...
        reason: why no site of this weight could be read; None for one that has sites.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    reason: str | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums of one or more batches.

    Attributes:
        sites: every use of every weight, in execution order.
        modules: outputs that Flax captured, in the order of their names.
        places: every leaf of `params` once, in the order of first use.
    """

    sites: tuple[SiteStatistics, ...]
    modules: tuple[ModuleStatistics, ...]
    places: tuple[Place, ...] = dataclasses.field(metadata=_STATIC)


def collect(
    params: Any, apply_fn: Callable, batch: Any, *, rngs: Any = None, **apply_kwargs: Any
) -> Statistics:
    """Run the model once and sum what its units emit.

    Args:
        params: the variables dict, or its `params` collection.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, or `f(params, *batch)`.
        batch: the model's input; a tuple is several positional inputs.
        rngs: passed to `apply_fn` as `rngs`, for dropout.
        **apply_kwargs: passed to `apply_fn`; arrays among them may change without recompiling.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or `apply_fn` does not accept them.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Dense(2, use_bias=False)
    >>> params = {"params": {"kernel": jnp.array([[1.0, -1.0]])}}
    >>> (site,) = collect(params, model.apply, jnp.array([[2.0], [4.0]])).sites
    >>> site.post.mean_absolute
    Array([[3., 3.]], dtype=float32)
    """
    named = models.named_leaves(models.split_variables(params)[0])
    model = models.from_apply(params, apply_fn, batch, rngs, apply_kwargs)
    return _collect(model.function, tuple(named), model.origins, model.batch_size, model.params, model.inputs)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """The statistics of both batches together.

    Raises:
        TypeError: they are no statistics.
        ValueError: the two come from different models.
    """
    for name, statistics in (("first", first), ("second", second)):
        if not isinstance(statistics, Statistics):
            kind = type(statistics).__name__
            raise TypeError(f"`{name}` must be Statistics from `jaxeff.collect`, got {kind}")
    if _described(first) != _described(second):
        raise ValueError(
            "`first` and `second` come from different models: their sites or leaves differ. "
            "Merge statistics of one model on several batches."
        )
    sites = tuple(
        dataclasses.replace(a, input=a.input + b.input, pre=a.pre + b.pre, post=a.post + b.post)
        for a, b in zip(first.sites, second.sites, strict=True)
    )
    modules = tuple(
        dataclasses.replace(a, output=a.output + b.output)
        for a, b in zip(first.modules, second.modules, strict=True)
    )
    return Statistics(sites, modules, first.places)


def _described(statistics: Statistics) -> tuple:
    sites = tuple((site.path, site.kind, site.unit_axes) for site in statistics.sites)
    return statistics.places, sites, tuple(module.path for module in statistics.modules)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _collect(
    function: models.Function,
    paths: Sequence[str],
    origins: Sequence[str],
    batch_size: int | None,
    params: Any,
    inputs: Any,
) -> Statistics:
    found, modules = _trace(function, paths, origins, params, inputs)
    watch = _Watch()
    roles = [_watch_site(watch, site, found.leaves[site.leaf].shape) for site in found.sites]
    outputs = [(path, watch.add(value, _last_axis(value))) for path, value in modules]
    _, observed = graph.evaluate(found.program, jax.tree.leaves((params, inputs)), watch.observers())
    sites = tuple(
        _site_statistics(site, found.leaves, batch_size, *(observed[value][i] for value, i in watched))
        for site, watched in zip(found.sites, roles, strict=True)
    )
    module_statistics = tuple(ModuleStatistics(path, observed[value][i]) for path, (value, i) in outputs)
    return Statistics(sites, module_statistics, _places(found))


def _trace(
    function: models.Function, paths: Sequence[str], origins: Sequence[str], params: Any, inputs: Any
) -> tuple[graph.Graph, list[tuple[str, Value]]]:
    """The model's graph, and the captured module outputs in execution order."""
    try:
        closed, (outputs, captured) = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    except jax.errors.UnexpectedTracerError:
        # Flax captured a value out of a transformation (a module called inside nn.cond, say).
        plain = function.without_capture()
        closed, (outputs, captured) = jax.make_jaxpr(plain, return_shape=True)(params, inputs)
    program = graph.flatten(closed)
    leaves = [
        graph.Leaf(path, tuple(jnp.shape(leaf)), jnp.result_type(leaf))
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
    ]
    values = program.outputs[len(jax.tree.leaves(outputs)) :]
    given = list(zip(program.inputs[len(leaves) :], origins, strict=True))
    constants, batch = ([v for v, origin in given if origin == kind] for kind in ("constant", "batch"))
    found = graph.build(program, leaves, constants, batch)
    # What holds no data is no activation: OptimizedLSTMCell's submodules return their kernels.
    modules = [
        (path, value)
        for path, value in zip(sorted(captured), values, strict=True)
        if isinstance(value, Value) and found.provenance.is_data(value)
    ]
    made = {value: i for i, operation in enumerate(program.operations) for value in operation.outputs}
    return found, sorted(modules, key=lambda module: made.get(module[1], -1))


_Reduction = Callable[[jax.Array], UnitStatistics]
_Watched = tuple[Value, int]


class _Watch:
    """Which values to reduce while the program runs, and how: each value may be asked for several times."""

    def __init__(self) -> None:
        self._reductions: dict[Value, list[_Reduction]] = {}

    def add(self, value: Value, reduction: _Reduction) -> _Watched:
        """Ask for a reduction; the answer will be `observed[value][i]`."""
        asked = self._reductions.setdefault(value, [])
        asked.append(reduction)
        return value, len(asked) - 1

    def observers(self) -> graph.Observers:
        reductions = {
            value: functools.partial(_reduce_all, asked) for value, asked in self._reductions.items()
        }
        return graph.Observers(reductions, _add_all)


def _reduce_all(reductions: Sequence[_Reduction], array: jax.Array) -> list[UnitStatistics]:
    return [reduction(array) for reduction in reductions]


def _add_all(first: Sequence[UnitStatistics], second: Sequence[UnitStatistics]) -> list[UnitStatistics]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _watch_site(
    watch: _Watch, site: graph.Site, shape: tuple[int, ...]
) -> tuple[_Watched, _Watched, _Watched]:
    activation = site.activation
    pre = _over_axes(activation.pre_dims, site.unit_axes, shape)
    post = _over_axes(activation.post_dims, site.unit_axes, shape)
    return (
        watch.add(site.input, _over_input(site, shape)),
        watch.add(activation.pre, pre),
        watch.add(activation.post, post),
    )


def _over_input(site: graph.Site, shape: tuple[int, ...]) -> _Reduction:
    if site.kind == "embedding":
        return functools.partial(_count_rows, next(iter(site.input_axes)), shape)
    if site.groups == 1:
        return _over_axes(site.input_dims, site.input_axes, shape)
    return functools.partial(_grouped_input, site, shape)


def _over_axes(dims: Dims, kept: frozenset[int], shape: Sequence[int]) -> _Reduction:
    return functools.partial(_unit_statistics, functools.partial(axes.reduce_to_axes, dims, kept, shape))


def _last_axis(value: Value) -> _Reduction:
    units = len(value.shape) - 1
    dims = (*axes.of_data(value.shape[:-1]), (axes.Factor(0, value.shape[units]),))
    return _over_axes(dims, frozenset({0}), value.shape[-1:])


def _unit_statistics(reduce: Callable[..., jax.Array], array: jax.Array) -> UnitStatistics:
    """`reduce(array, reduction)` reduces all but the units' axes."""
    wide = widened(array)
    magnitude = jnp.abs(wide)
    maximum = reduce(magnitude, jnp.max)
    count = jnp.asarray(array.size // maximum.size, wide.dtype)
    # Summed as floats: XLA's CPU takes five times longer over integers.
    zeros = reduce(jnp.where(wide == 0, jnp.ones_like(wide), 0), jnp.sum)
    return UnitStatistics(
        reduce(magnitude, jnp.sum), reduce(jnp.square(wide), jnp.sum), maximum, zeros, count
    )


def _count_rows(axis: int, shape: tuple[int, ...], indices: jax.Array) -> UnitStatistics:
    """An embedding's input, seen as one-hot rows: how often each row was looked up."""
    rows = jnp.zeros(shape[axis], jnp.int32).at[indices.ravel()].add(1).astype(jnp.float32)
    rows = rows.reshape([size if i == axis else 1 for i, size in enumerate(shape)])
    count = jnp.asarray(indices.size, jnp.float32)
    return UnitStatistics(rows, rows, (rows > 0).astype(jnp.float32), count - rows, count)


def _grouped_input(site: graph.Site, shape: tuple[int, ...], array: jax.Array) -> UnitStatistics:
    """A grouped convolution's input: which channel a kernel element meets depends on its output's group."""
    (inputs,), (outputs,) = site.input_axes, site.unit_axes
    channels = (site.groups, shape[inputs])
    dims = tuple(_numbered(dim) for dim in site.input_dims)
    per_channel = _over_axes(dims, frozenset({0, 1}), channels)(array)
    laid = [size if axis in (inputs, outputs) else 1 for axis, size in enumerate(shape)]

    def lay(sums: jax.Array) -> jax.Array:
        if sums.ndim == 0:
            return sums
        spread = jnp.repeat(sums, shape[outputs] // site.groups, axis=0)
        return (spread if outputs < inputs else spread.T).reshape(laid)

    return jax.tree.map(lay, per_channel)


def _numbered(dim: tuple[axes.Factor, ...]) -> tuple[axes.Factor, ...]:
    # The channels' dimension is (groups, channels of a group): axes 0 and 1 of what is kept.
    return tuple(axes.Factor(i, factor.size) for i, factor in enumerate(dim)) if len(dim) == 2 else dim


def _site_statistics(
    site: graph.Site,
    leaves: Sequence[graph.Leaf],
    batch_size: int | None,
    input: UnitStatistics,
    pre: UnitStatistics,
    post: UnitStatistics,
) -> SiteStatistics:
    bias = site.activation.bias
    return SiteStatistics(
        path=leaves[site.leaf].path,
        kind=site.kind,
        nonlinearity=site.activation.nonlinearity,
        bias=None if bias is None else leaves[bias].path,
        unit_axes=tuple(sorted(site.unit_axes)),
        input_axes=tuple(sorted(site.input_axes)),
        layer_axes=tuple(sorted(loop.axis for loop in site.loops if loop.axis is not None)),
        macs=_per_example(site.macs, batch_size),
        input=_over_iterations(input, site.loops),
        pre=_over_iterations(pre, site.loops),
        post=_over_iterations(post, site.loops),
    )


def _per_example(macs: int | None, batch_size: int | None) -> int | None:
    return macs // batch_size if macs is not None and batch_size and macs % batch_size == 0 else None


def _over_iterations(seen: UnitStatistics, loops: Sequence[graph.Loop]) -> UnitStatistics:
    """Fold the leading axes that scans have added: layers become an axis of the weight, time is summed."""
    scans = [loop for loop in loops if loop.name == "scan"]
    rank = seen.absolute_sum.ndim - len(scans)
    count = seen.count.reshape(*seen.count.shape, *(1,) * rank)
    folded = dataclasses.replace(seen, count=count)
    for position, loop in reversed(list(enumerate(scans))):
        folded = _sum_iterations(folded, position) if loop.axis is None else _lay(folded, position, loop.axis)
    whole = folded.count.size == 1
    return dataclasses.replace(folded, count=folded.count.reshape(())) if whole else folded


def _sum_iterations(seen: UnitStatistics, position: int) -> UnitStatistics:
    summed = jax.tree.map(lambda sums: jnp.sum(sums, axis=position), seen)
    return dataclasses.replace(summed, maximum=jnp.max(seen.maximum, axis=position))


def _lay(seen: UnitStatistics, position: int, axis: int) -> UnitStatistics:
    """Move the axis of iterations to where the weight stacks its layers, which has size 1 so far."""

    def lay(sums: jax.Array) -> jax.Array:
        moved = jnp.moveaxis(sums, position, position + axis)
        shape = list(moved.shape)
        del shape[position + axis + 1]
        return moved.reshape(shape)

    return jax.tree.map(lay, seen)


def _places(found: graph.Graph) -> tuple[Place, ...]:
    def place(index: int) -> Place:
        leaf = found.leaves[index]
        role = found.others.get(index, "weight") if leaf.size else "empty"
        return Place(leaf.path, leaf.shape, str(jnp.dtype(leaf.dtype)), role, found.unpaired.get(index))

    return tuple(place(index) for index in found.order)
