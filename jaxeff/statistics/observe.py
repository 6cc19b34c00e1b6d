"""Runs a model under observation, summing the activations of its units where they are made.

It returns the statistics of sites and modules, and the role of every leaf of `params`. The activations
themselves are never kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import graph
from jaxeff.graph import axes
from jaxeff.graph.batch_axes import Axes as MaskAxes
from jaxeff.graph.batch_axes import Standing
from jaxeff.graph.nonlinearities import BOUNDS
from jaxeff.graph.program import Value
from jaxeff.model.functions import Function
from jaxeff.model.roles import ParamInfo
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.statistics import ranges as ranges_of
from jaxeff.statistics import second_moments
from jaxeff.statistics.counted import Counted, Place, cleared, mask_axes, number
from jaxeff.statistics.largest import Largest
from jaxeff.statistics.macs import macs_of
from jaxeff.statistics.records import (
    AttentionStatistics,
    HeadlessAttention,
    HeadSlices,
    ModuleStatistics,
    SiteStatistics,
    Statistics,
    UnitStatistics,
)
from jaxeff.statistics.sums import sums
from jaxeff.statistics.units import OverAxes, fold, join, of_emissions


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2, 3), static_argnames=("hessians", "ranges", "axes_of_where")
)
def observe(
    function: Function,
    paths: Sequence[str],
    origins: Sequence[str],
    batch_size: int | None,
    params: Any,
    inputs: Any,
    where: jax.Array | None = None,
    *,
    hessians: bool = False,
    ranges: bool = False,
    axes_of_where: tuple[MaskAxes, ...] | None = None,
) -> Statistics:
    """Run `function(params, inputs)` once, and sum the inputs and activations of its units.

    Args:
        paths: of the leaves of `params`.
        origins: of the leaves of `inputs`, as in `Model`.
        batch_size: number of examples, for the multiply-accumulates of one.
        where: the examples, [n], or their positions, [n, length], that count; None for all.
        hessians: whether to sum the products of each pair of a layer's inputs as well.
        ranges: whether to count the sizes of a layer's inputs as well.
        axes_of_where: for each leaf of `inputs`, the axis of `where` that each dimension is, or None; by default the
            leading axes of the batch.
    """
    found, modules = trace(function, paths, origins, params, inputs)
    counted = None
    if where is not None:
        if axes_of_where is None:
            shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
            axes_of_where = mask_axes(shapes, origins, where.shape)
        counted = Counted.of(found, where, axes_of_where)
    watch = _Watch(counted)
    of_sites = [found.leaves[site.leaf] for site in found.sites]
    roles = [_watch_site(watch, site, leaf) for site, leaf in zip(found.sites, of_sites, strict=True)]
    refused = [second_moments.refusal(site) if hessians else None for site in found.sites]
    products = [
        watch.add(site.input, second_moments.Products.of(site, leaf.shape), _input_place(site, leaf))
        if hessians and refusal is None
        else None
        for site, leaf, refusal in zip(found.sites, of_sites, refused, strict=True)
    ]
    without = [
        ranges_of.refusal(site, leaf.shape) if ranges else None
        for site, leaf in zip(found.sites, of_sites, strict=True)
    ]
    sizes = [
        watch.add(site.input, ranges_of.RangeSums.of(site, leaf.shape), _input_place(site, leaf))
        if ranges and refusal is None
        else None
        for site, leaf, refusal in zip(found.sites, of_sites, without, strict=True)
    ]
    outputs = [(path, _watch_module(watch, path, value)) for path, value in modules]
    shapes = [leaf.shape for leaf in found.leaves]
    attentions, headless = graph.attentions(found.program, found.sites, shapes, found.provenance)
    heads = [_watch_heads(watch, attention) for attention in attentions]
    _, observed = graph.evaluate(found.program, jax.tree.leaves((params, inputs)), watch.hooks())

    def seen(watched: _Watched) -> Any:
        return observed[watched[0]][watched[1]]

    macs = macs_of(found.sites, found.leaves, batch_size)
    sites = [
        _site_statistics(site, found.leaves, each, seen(input), seen(pre), [*map(seen, post)])
        for site, each, (input, pre, post) in zip(found.sites, macs, roles, strict=True)
    ]
    for i, (site, (input, _, _), watched) in enumerate(zip(found.sites, roles, products, strict=True)):
        if hessians:
            moments = watched and second_moments.over_iterations(seen(watched), seen(input), site.loops)
            sites[i] = dataclasses.replace(sites[i], second_moments=moments, without_moments=refused[i])
    for i, (site, watched) in enumerate(zip(found.sites, sizes, strict=True)):
        if ranges:
            counted_sizes = watched and ranges_of.over_iterations(seen(watched), site.loops)
            sites[i] = dataclasses.replace(sites[i], ranges=counted_sizes, without_ranges=without[i])
    return Statistics(
        tuple(sites),
        tuple(ModuleStatistics(path, seen(watched)) for path, watched in outputs),
        tuple(
            _attention_statistics(attention, found.leaves, seen(entropy), seen(largest))
            for attention, (entropy, largest) in zip(attentions, heads, strict=True)
        ),
        {},
        _params(found),
        tuple(_headless(one, found.leaves) for one in headless),
    )


def trace(
    function: Function, paths: Sequence[str], origins: Sequence[str], params: Any, inputs: Any
) -> tuple[graph.Graph, list[tuple[str, Value]]]:
    """Return the model's graph, and the captured module outputs in execution order."""
    try:
        closed, (outputs, captured) = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    except jax.errors.UnexpectedTracerError:
        # Flax captured a value that leaked out of a transformation, such as a module called inside nn.cond.
        plain = function.without_capture()
        closed, (outputs, captured) = jax.make_jaxpr(plain, return_shape=True)(params, inputs)
    program = graph.flatten(closed)
    leaves = [
        graph.Leaf(path, tuple(jnp.shape(leaf)), jnp.result_type(leaf))
        for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
    ]
    returned = len(jax.tree.leaves(outputs))
    values = program.outputs[returned:]
    given = list(zip(program.inputs[len(leaves) :], origins, strict=True))
    constants, batch = ([v for v, origin in given if origin == kind] for kind in ("constant", "batch"))
    found = graph.build(program, leaves, constants, batch, returned)
    # Values without data are not activations: OptimizedLSTMCell's submodules return their kernels.
    modules = [
        (path, value)
        for path, value in zip(sorted(captured), values, strict=True)
        if isinstance(value, Value) and found.provenance.is_data(value)
    ]
    made = {value: i for i, operation in enumerate(program.operations) for value in operation.outputs}
    return found, sorted(modules, key=lambda module: made.get(module[1], -1))


_Reduction = Callable[[jax.Array, jax.Array | None], Any]
"""`reduction(array, counts)`; counts has the array's size, or 1, in each dimension; None where all counts."""
_Watched = tuple[Value, int]


class _Watch:
    """Which values to reduce while the program runs, and how; a value may be requested several times.

    Args:
        counted: which examples and positions count; None for all.
    """

    def __init__(self, counted: Counted | None) -> None:
        self._counted = counted
        self._reductions: dict[Value, list[tuple[_Reduction, Standing | None]]] = {}

    def add(self, value: Value, reduction: _Reduction, place: Place) -> _Watched:
        """Request a reduction, which will be `observed[value][i]`. Equal reductions are made once."""
        standing = None if self._counted is None else self._counted.standing(value, place)
        asked = self._reductions.setdefault(value, [])
        if (reduction, standing) not in asked:
            asked.append((reduction, standing))
        return value, asked.index((reduction, standing))

    def hooks(self) -> graph.Hooks:
        where = None if self._counted is None else self._counted.where
        reductions = {
            value: functools.partial(_reduce_all, asked, where) for value, asked in self._reductions.items()
        }
        return graph.Hooks(reductions, _add_all)


def _reduce_all(
    requests: Sequence[tuple[_Reduction, Standing | None]], where: jax.Array | None, array: jax.Array
) -> list[Any]:
    return [
        reduction(array, None if where is None or standing is None else standing.lay(where))
        for reduction, standing in requests
    ]


def _add_all(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _watch_site(
    watch: _Watch, site: graph.Site, leaf: graph.Leaf
) -> tuple[_Watched, _Watched, list[_Watched]]:
    activation = site.activation
    emitted = Place(f"the outputs of {leaf.path!r}", activation.pre_dims, site.unit_axes, site.loops)
    pre = _UnitSums(OverAxes(activation.pre_dims, site.unit_axes, leaf.shape))
    # The parts of a fused layer are joined, so either all count their saturated values or none does.
    bounded = any(emission.nonlinearity in BOUNDS for emission in activation.post)
    post = [
        watch.add(
            emission.value,
            _UnitSums(over, _edges(emission.nonlinearity) if bounded else None),
            emitted._replace(dims=emission.dims),
        )
        for emission, over in zip(activation.post, of_emissions(site), strict=True)
    ]
    input = watch.add(site.input, _over_input(site, leaf.shape), _input_place(site, leaf))
    return input, watch.add(activation.pre, pre, emitted), post


def _input_place(site: graph.Site, leaf: graph.Leaf) -> Place:
    return Place(f"the inputs of {leaf.path!r}", site.input_dims, site.input_axes, site.loops)


def _watch_module(watch: _Watch, path: str, value: Value) -> _Watched:
    units = len(value.shape) - 1
    dims = (*axes.of_data(value.shape[:-1]), (axes.Factor(0, value.shape[units]),))
    over = OverAxes(dims, frozenset({0}), value.shape[-1:])
    return watch.add(value, _UnitSums(over), Place(f"the outputs of module {path!r}", dims, over.kept))


def _watch_heads(watch: _Watch, attention: graph.Attention) -> tuple[_Watched, _Watched]:
    """Request the entropy of each head, and the largest logit of all."""
    dims = axes.of_data(attention.logits.shape)
    place = Place("an attention", dims, loops=attention.loops, ignored=(attention.over,))
    entropy = _HeadEntropy(attention.over, attention.base, attention.head_dims)
    watched = watch.add(attention.logits, entropy, place)
    return watched, watch.add(attention.logits, _LargestLogit(attention.over), place)


def _edges(nonlinearity: str) -> tuple[float, float]:
    """Return the values beyond which an activation is within 1 % of a bound, where the slope is nearly 0."""
    low, high = BOUNDS.get(nonlinearity, (-jnp.inf, jnp.inf))
    margin = 0.01 * (high - low) if nonlinearity in BOUNDS else 0
    return low + margin, high - margin


def _over_input(site: graph.Site, shape: tuple[int, ...]) -> _Reduction:
    if site.kind == "embedding":
        return functools.partial(_count_rows, next(iter(site.input_axes)), shape)
    if site.groups == 1:
        return _UnitSums(OverAxes(site.input_dims, site.input_axes, shape))
    return functools.partial(_grouped_input, site, shape)


@dataclasses.dataclass(frozen=True)
class _UnitSums:
    """Statistics of an array; values beyond the edges count as saturated."""

    over: OverAxes
    edges: tuple[float, float] | None = None

    def __call__(self, array: jax.Array, counts: jax.Array | None) -> UnitStatistics:
        found = self.over.reduce(cleared(array, counts), functools.partial(sums, edges=self.edges))
        count = jnp.asarray(number(self.over.count, counts), found.maximum.dtype)
        zeros, saturated = found.zeros, found.saturated
        if counts is not None:
            # What does not count was cleared, and counted as zeros.
            zeros = zeros - (self.over.count - count)
            if saturated is not None and self.edges and not self.edges[0] < 0 < self.edges[1]:
                saturated = saturated - (self.over.count - count)
        return UnitStatistics(found.absolute, found.square, found.maximum, zeros, count, saturated)


def _count_rows(
    axis: int, shape: tuple[int, ...], indices: jax.Array, counts: jax.Array | None
) -> UnitStatistics:
    """Count how often each row of an embedding was looked up, which is the sum of its one-hot inputs."""
    once = jnp.ones((), bool) if counts is None else counts

    def looked_up(indices: jax.Array, once: jax.Array) -> jax.Array:
        each = jnp.broadcast_to(once, indices.shape).astype(jnp.int32)
        return jnp.zeros(shape[axis], jnp.int32).at[indices.ravel()].add(each.ravel())

    rows = by_compiler(looked_up, indices, once).astype(jnp.float32)
    rows = rows.reshape([size if i == axis else 1 for i, size in enumerate(shape)])
    count = jnp.asarray(number(indices.size, counts), jnp.float32)
    return UnitStatistics(rows, rows, (rows > 0).astype(jnp.float32), count - rows, count)


def _grouped_input(
    site: graph.Site, shape: tuple[int, ...], array: jax.Array, counts: jax.Array | None
) -> UnitStatistics:
    """Reduce a grouped convolution's input; which channel a kernel element meets depends on its output's group."""
    (inputs,), (outputs,) = site.input_axes, site.unit_axes
    channels = (site.groups, shape[inputs])
    dims = tuple(_numbered(dim) for dim in site.input_dims)
    per_channel = _UnitSums(OverAxes(dims, frozenset({0, 1}), channels))(array, counts)
    laid = [size if axis in (inputs, outputs) else 1 for axis, size in enumerate(shape)]

    def lay(sums: jax.Array) -> jax.Array:
        if sums.ndim == 0:
            return sums
        spread = jnp.repeat(sums, shape[outputs] // site.groups, axis=0)
        return (spread if outputs < inputs else spread.T).reshape(laid)

    return jax.tree.map(lay, per_channel)


def _numbered(dim: tuple[axes.Factor, ...]) -> tuple[axes.Factor, ...]:
    # The channels' dimension is (groups, channels of a group), which are axes 0 and 1 of the result.
    return tuple(axes.Factor(i, factor.size) for i, factor in enumerate(dim)) if len(dim) == 2 else dim


@dataclasses.dataclass(frozen=True)
class _HeadEntropy:
    """Sums the entropies of each head's distributions, each over one dimension, and counts them."""

    over: int
    base: float
    head_dims: tuple[int, ...]

    def __call__(self, array: jax.Array, counts: jax.Array | None) -> jax.Array:
        return by_compiler(self._summed, array, *(() if counts is None else (counts,)))

    def _summed(self, array: jax.Array, counts: jax.Array | None = None) -> jax.Array:
        logits = widened(array) if self.base == math.e else widened(array) * math.log(self.base)
        # As a softmax writes them, so that the compiler shares them; the probabilities are rarely kept.
        most = jnp.max(logits, self.over, keepdims=True)
        total = jnp.sum(jnp.exp(logits - most), self.over, keepdims=True)
        # -ln p, from the largest logit down: exact where all are equal, as in a row that is masked whole.
        surprise = most - logits + jnp.log(total)
        parts = jnp.exp(-surprise)
        # A masked position has the probability 0, whose logarithm is -inf.
        entropies = jnp.sum(jnp.where(parts == 0, 0, parts * surprise), self.over, keepdims=True)
        entropies = entropies if counts is None else jnp.where(counts, entropies, 0)
        others = tuple(i for i in range(array.ndim) if i not in self.head_dims)
        sums = jnp.ravel(jnp.sum(entropies, others))
        return jnp.append(sums, number(entropies.size // sums.size, counts))


@dataclasses.dataclass(frozen=True)
class _LargestLogit:
    """The largest logit, from the maxima over one dimension, which a softmax has made anyway."""

    over: int

    def __call__(self, array: jax.Array, counts: jax.Array | None) -> Largest:
        maximum = by_compiler(self._of_all, array, *(() if counts is None else (counts,)))
        seen = jnp.ones_like(maximum) if counts is None else jnp.any(counts).astype(maximum.dtype)
        return Largest(maximum, seen)

    def _of_all(self, array: jax.Array, counts: jax.Array | None = None) -> jax.Array:
        maxima = jnp.max(widened(array), self.over, keepdims=True)
        lowest = jnp.finfo(maxima.dtype).min
        return jnp.max(maxima if counts is None else jnp.where(counts, maxima, lowest))


def _attention_statistics(
    attention: graph.Attention, leaves: Sequence[graph.Leaf], sums: jax.Array, largest: Largest
) -> AttentionStatistics:
    slices = tuple(
        HeadSlices(leaves[member.leaf].path, member.axis, member.indices)
        for member in sorted(attention.members, key=lambda member: member.leaf)
    )
    scans = [loop for loop in attention.loops if loop.name == "scan"]
    in_time = tuple(position for position, loop in enumerate(scans) if loop.axis is None)
    summed = jnp.sum(sums, in_time)
    # Where nothing was seen, take the lowest number, so that it is never the largest.
    values = jnp.where(largest.seen > 0, largest.value, jnp.finfo(largest.value.dtype).min)
    most = Largest(jnp.max(values, in_time), jnp.max(largest.seen, in_time))
    path, heads = _common([part.path for part in slices]), attention.heads
    parts = summed[..., :-1], summed[..., -1:]
    return AttentionStatistics(path, heads, attention.units, slices, *parts, most)


def _headless(attention: graph.Headless, leaves: Sequence[graph.Leaf]) -> HeadlessAttention:
    path = _common([leaves[leaf].path for leaf in sorted(attention.leaves)])
    return HeadlessAttention(path, attention.reason)


def _common(paths: Sequence[str]) -> str:
    """Return the keys with which all paths begin, or the first path if they share none."""
    shared = os.path.commonprefix([path.split("/") for path in paths])
    return "/".join(shared) or (paths[0] if paths else "")


def _site_statistics(
    site: graph.Site,
    leaves: Sequence[graph.Leaf],
    macs: int | None,
    input: UnitStatistics,
    pre: UnitStatistics,
    post: Sequence[UnitStatistics],
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
        macs=macs,
        input=_over_iterations(input, site.loops),
        pre=_over_iterations(pre, site.loops),
        post=_over_iterations(_joined(site, post), site.loops),
        uncounted=site.macs is None,
    )


def _joined(site: graph.Site, parts: Sequence[UnitStatistics]) -> UnitStatistics:
    """Join the statistics of all units from those of each emission, which saw equally many positions."""
    laid = [dataclasses.replace(part, count=part.zeros) for part in parts]
    joined = jax.tree.map(lambda *sums: join(site, sums), *laid)
    return dataclasses.replace(joined, count=parts[0].count)


def _over_iterations(seen: UnitStatistics, loops: Sequence[graph.Loop]) -> UnitStatistics:
    """Fold the leading axes that scans have added."""
    scans = sum(loop.name == "scan" for loop in loops)
    rank = seen.absolute_sum.ndim - scans
    laid = dataclasses.replace(seen, count=seen.count.reshape(*seen.count.shape, *(1,) * rank))
    folded = jax.tree.map(lambda sums: fold(sums, loops), laid)
    count = folded.count.reshape(()) if folded.count.size == 1 else folded.count
    return dataclasses.replace(folded, maximum=fold(laid.maximum, loops, jnp.max), count=count)


def _params(found: graph.Graph) -> tuple[ParamInfo, ...]:
    def info(index: int) -> ParamInfo:
        leaf = found.leaves[index]
        role = found.others.get(index, "weight") if leaf.size else "empty"
        return ParamInfo(leaf.path, leaf.shape, str(jnp.dtype(leaf.dtype)), role, found.unpaired.get(index))

    return tuple(info(index) for index in found.order)
