"""Importance -> which weights stay: a mask for each leaf, True = kept.

Imports `allocation`, `layouts`, `patterns`, `selection`; of jaxeff `importance`, `leaves` and `meshes`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import Array
from jax.core import Tracer

from jaxeff import importance as criteria
from jaxeff.leaves import is_variables, named_leaves, split_variables
from jaxeff.meshes import by_compiler, laid_like
from jaxeff.prune.allocation import ALLOCATIONS, Measured, lamp
from jaxeff.prune.layouts import (
    Axes,
    Layout,
    Scores,
    assumed,
    axes_of,
    by_layer,
    by_shape,
    check_named,
    is_scores,
    layer_names,
    of_statistics,
    unboxed,
    unknown_layers,
)
from jaxeff.prune.patterns import UNSTRUCTURED, NByM, Pattern, Unstructured
from jaxeff.prune.selection import lowest, lowest_of_each
from jaxeff.statistics import Statistics

Prunable = Callable[[str, Any], bool] | Mapping[str, bool] | Layout | None
SCOPES = ("unit", "layer", "global")
Limits = float | Mapping[str, float] | None


def scored(
    params: Any,
    statistics: Statistics | None = None,
    criterion: str | criteria.Score = "magnitude",
    *,
    prunable: Prunable = None,
) -> Any:
    """The importance of every weight, shaped like `params`.

    Args:
        params: a tree of arrays, or variables, of which the `params` collection alone may be pruned.
        statistics: from `jaxeff.collect` or `jaxeff.calibrate`, for this criterion; without them, magnitudes.
        criterion: as `jaxeff.analyze` takes it.
        prunable: which leaves may be pruned: what `prune.layout` makes of the program, a function
            `(path, leaf) -> bool`, or exceptions by path.

    Returns:
        Scores where a leaf may be pruned; a number, 0, where it may not. By the program, where statistics or
        a layout tell, weights may; without it floating arrays of two axes or more in each layer. Leaves
        named `bias`, `scale` or `embedding` stay whole. Where a weight is no kernel of inputs by outputs,
        what its axes index goes with its scores, in a box (`prune.Scores`) that reads as the array.

    Raises:
        ValueError: a path of `prunable` is none of the leaves', or has no scores; or the criterion needs
            statistics.

    Warns:
        UserWarning: without a program, layers look stacked; says how each leaf was taken.

    >>> scored({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)})["kernel"]
    Array([[1., 2.]], dtype=float32)
    """
    core, _ = split_variables(params)
    named = named_leaves(core)
    if statistics is not None:
        found = criteria.scores(params, statistics, criterion)
        known = of_statistics(statistics, named)
    elif criteria.named(criterion).function is criteria.magnitude:
        found = {path: jnp.abs(leaf) for path, leaf in named.items()}
        known = prunable if isinstance(prunable, Layout) else by_shape(named)
        _warn_of_stacks(known, prunable)
    else:
        raise ValueError(f"`statistics` are missing: criterion {criterion!r} is made of them")
    chosen = prunable_paths(prunable, named, known)
    if missing := sorted(_asked_for(prunable, chosen) - found.keys()):
        raise ValueError(f"`prunable` asks for {missing[0]!r}, which multiplies no data and has no scores")
    scores = [
        _boxed(path, found[path], known[path].axes) if path in chosen & found.keys() else jnp.zeros(())
        for path in named
    ]
    tree = jax.tree.unflatten(jax.tree.structure(core), scores)
    if core is params:
        return tree
    return {**jax.tree.map(lambda leaf: jnp.zeros(()), dict(params)), "params": tree}


def _boxed(path: str, scores: Array, axes: Axes | None) -> Any:
    """Scores in a box where `masks` would not know what their axes index."""
    return scores if axes in (None, assumed(path, scores.shape)) else Scores(scores, axes)


def _asked_for(prunable: Prunable, chosen: set[str]) -> set[str]:
    """The leaves that the user named."""
    if isinstance(prunable, Layout) or callable(prunable):
        return chosen
    return {path for path, may in (prunable or {}).items() if may}


def prunable_paths(prunable: Prunable, named: Mapping[str, Any], known: Layout | None = None) -> set[str]:
    """The leaves that may be pruned.

    Args:
        known: what says so of those that `prunable` does not name; names and shapes unless given.
    """
    if isinstance(prunable, Layout):
        _check_layout(prunable, named)
        return {leaf.path for leaf in prunable.leaves if leaf.prunable}
    if callable(prunable):
        return {path for path, leaf in named.items() if prunable(path, leaf)}
    exceptions = dict(prunable or {})
    check_named(exceptions, named)
    known = by_shape(named) if known is None else known
    return {path for path in named if exceptions.get(path, known[path].prunable)}


def _check_layout(layout: Layout, named: Mapping[str, Any]) -> None:
    found = {leaf.path: leaf.shape for leaf in layout.leaves}
    wanted = {path: tuple(jnp.shape(leaf)) for path, leaf in named.items()}
    if found != wanted:
        different = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        raise ValueError(
            f"`prunable` is a layout of other params: {different[0]!r} has shape {found.get(different[0])} "
            f"there and {wanted.get(different[0])} here"
        )


def _warn_of_stacks(known: Layout, prunable: Prunable) -> None:
    if known.stacked and not isinstance(prunable, Layout):
        where = ", ".join(repr(top) if top else "all leaves" for top in known.stacked)
        warnings.warn(
            f"the shapes under {where} look like stacked layers, and are taken so. `prunable="
            "prune.layout(params, apply_fn, batch)` asks the program instead; `prune.layout(params)` as "
            f"`prunable` agrees. Taken as:\n{known}",
            stacklevel=3,
        )


def masks(
    importance: Any,
    sparsity: float | Array | None = None,
    *,
    scope: str = "layer",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] | Measured = "uniform",
    max_sparsity: Limits = None,
) -> Any:
    """Which weights stay if the least important go.

    Exactly round(sparsity x groups) groups of the pattern go, of each layer or of all; of equal scores the
    first.

    Args:
        importance: a tree of non-negative scores, such as `scored` gives; a leaf that is one number stays
            whole.
        sparsity: the fraction to remove, in [0, 1), which may be traced. None for `NByM`, which has its own.
        scope: 'layer' removes from each layer by itself, 'unit' from the weights of each output by
            themselves, 'global' in one order over all. Layers that a scan stacks in one leaf are layers, as
            in a report, if the scores come of statistics or of a `prune.layout`; else a leaf is a layer, and
            of units only those of a kernel of two axes are known.
        pattern: `Unstructured()`, `Block(shape)`, `Units()` or `NByM(n, m)`. The last two go along the inputs
            or outputs of each weight: as the scores know them, or as their `axes` say.
        allocation: with scope 'layer' or 'unit', how much of each layer: 'uniform', 'erk', fractions by
            name ('blocks/q[3]', or 'blocks/q' for all layers of a leaf), or what `sensitivity` measured.
            With scope 'global', 'lamp' makes the scores of layers comparable first.
        max_sparsity: at most so much of any layer goes, or of those named; with scope 'global' others make
            up for it.

    Returns:
        Masks, True = kept, shaped like `importance`.

    Raises:
        ValueError: an argument is out of range, a pattern does not divide a leaf, or a score is nan or
            negative.

    Warns:
        UserWarning: nothing of a layer would be left.

    >>> masks({"a": jnp.array([3.0, 1.0, 2.0, 4.0]), "b": jnp.zeros(())}, 0.5)["a"]
    Array([ True, False, False,  True], dtype=bool)
    """
    axes = dict(zip(_by_path(unboxed(importance)), axes_of(importance), strict=True))
    importance = unboxed(importance)
    named = _by_path(importance)
    scores = {path: score for path, score in named.items() if jnp.ndim(score)}
    if isinstance(allocation, Measured):
        allocation = allocation.allocation(sparsity)
    _check(scores, sparsity, scope, pattern)
    grouped = {path: _Grouped.of(path, score, axes[path], pattern) for path, score in scores.items()}
    layers = {path: group.layers for path, group in grouped.items()}
    shares = _check_allocation(layers, scope, allocation)
    if isinstance(pattern, NByM):
        kept = {path: group.scores for path, group in grouped.items()}
    else:
        select = _of_all if scope == "global" else _of_each
        chosen = select(grouped, scope, sparsity, shares, _limits(max_sparsity, layers))
        kept = {
            path: laid_like(grouped[path].expanded(mask, pattern), scores[path])
            for path, mask in chosen.items()
        }
    _warn_of_collapse(grouped, kept)
    leaves = [kept.get(path, jnp.asarray(True)) for path in named]
    return jax.tree.unflatten(jax.tree.structure(importance), leaves)


def _by_path(importance: Any) -> dict[str, Any]:
    """The leaves by path; those of the `params` collection of variables by their path below it."""
    named = named_leaves(importance)
    above = "params/" if is_variables(importance) else ""
    return {path.removeprefix(above): leaf for path, leaf in named.items()}


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """One leaf, what goes together in each of its layers having one score.

    Attributes:
        scores: of the groups, with the layers at the axes where the leaf has them; of `NByM` the mask.
        shape: of the leaf.
        axes: of the leaf, as the pattern or the scores have them.
        layers: their names.
    """

    path: str
    scores: Array
    shape: tuple[int, ...]
    axes: Axes
    layers: tuple[str, ...]

    @classmethod
    def of(cls, path: str, score: Array, axes: Axes | None, pattern: Pattern) -> _Grouped:
        axes = pattern.located(path, score, axes)
        group = pattern.kept if isinstance(pattern, NByM) else pattern.groups
        grouped = in_layers(lambda layer: group(layer, path, axes.of_layer), axes.layers)
        groups = by_compiler(grouped, score, like=score)
        return cls(path, groups, score.shape, axes, layer_names(path, score.shape, axes.layers))

    def expanded(self, kept: Array, pattern: Any) -> Array:
        shape = tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes.layers)
        expanded = in_layers(lambda layer: pattern.expanded(layer, shape), self.axes.layers)
        return by_compiler(expanded, kept, like=kept)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Of the groups of one layer."""
        return tuple(size for axis, size in enumerate(self.scores.shape) if axis not in self.axes.layers)

    def apart(self, scope: str) -> tuple[int, ...]:
        """The axes along which each index is pruned by itself."""
        if scope == "layer":
            return tuple(sorted(self.axes.layers))
        if not self.axes.units:
            raise ValueError(
                f"`scope` 'unit' needs to know the units of {self.path!r}, shape {self.shape}: score it with "
                "statistics of the model, or with `prunable=prune.layout(params, apply_fn, batch)`"
            )
        return tuple(sorted({*self.axes.layers, *self.axes.units}))

    def of_rows(self, by_name: Mapping[str, Any], scope: str, size: int) -> Any:
        """round(share x size) of each row, by the share of its layer; shaped like the axes `apart`."""
        counts = [counted(by_name[name], size) for name in self.layers]
        traced = any(isinstance(count, Tracer) for count in counts)
        each = jnp.stack(counts) if traced else np.array(counts, np.int32)
        apart = self.apart(scope)
        each = each.reshape([self.shape[axis] if axis in self.axes.layers else 1 for axis in apart])
        return jnp.broadcast_to(each, [self.shape[axis] for axis in apart])


def in_layers(function: Callable[[Array], Array], layers: tuple[int, ...]) -> Callable[[Array], Array]:
    """The function on each layer of an array that stacks them along these axes."""
    for axis in sorted(layers):
        function = _along(function, axis)
    return function


def _along(function: Callable[[Array], Array], axis: int) -> Callable[[Array], Array]:
    return jax.vmap(function, in_axes=axis, out_axes=axis)


def _of_each(
    groups: dict[str, _Grouped], scope: str, sparsity: Any, allocation: Any, limits: dict[str, float]
) -> dict[str, Array]:
    shapes = {name: group.layer_shape for group in groups.values() for name in group.layers}
    shares = ALLOCATIONS[allocation](shapes, sparsity) if isinstance(allocation, str) else allocation
    shares = {name: _at_most(share, limits[name]) for name, share in shares.items()}
    apart = [group.apart(scope) for group in groups.values()]
    counts = [
        group.of_rows(shares, scope, group.scores.size // math.prod(group.scores.shape[a] for a in axes))
        for group, axes in zip(groups.values(), apart, strict=True)
    ]
    removed = lowest_of_each([group.scores for group in groups.values()], counts, apart)
    return {path: ~mask for path, mask in zip(groups, removed, strict=True)}


def _of_all(
    groups: dict[str, _Grouped], scope: str, sparsity: Any, allocation: Any, limits: dict[str, float]
) -> dict[str, Array]:
    scores = {path: group.scores for path, group in groups.items()}
    if allocation == "lamp":
        scores = {
            path: by_compiler(in_layers(lamp, groups[path].axes.layers), score, like=score)
            for path, score in scores.items()
        }
    count = counted(sparsity, sum(score.size for score in scores.values()))
    free = sum(counted(limits[name], math.prod(g.layer_shape)) for g in groups.values() for name in g.layers)
    limited = {path: g for path, g in groups.items() if any(limits[name] < 1 for name in g.layers)}
    apart = [group.apart("layer") for group in limited.values()]
    most = [group.of_rows(limits, "layer", math.prod(group.layer_shape)) for group in limited.values()]
    may_go = lowest_of_each([scores[path] for path in limited], most, apart) if limited else []
    for path, may in zip(limited, may_go, strict=True):
        # What a layer must keep goes after everything else.
        scores[path] = jnp.where(may, scores[path], jnp.inf)
    removed = lowest([*scores.values()], jnp.minimum(count, free))
    return {path: ~mask for path, mask in zip(groups, removed, strict=True)}


def counted(share: Any, size: int) -> Any:
    """round(share x size); in float32 where the share is traced."""
    if isinstance(share, Tracer):
        return jnp.round(share * size).astype(jnp.int32)
    return round(float(share) * size)


def _at_most(share: Any, limit: float) -> Any:
    return jnp.minimum(share, limit) if isinstance(share, Tracer) else min(float(share), limit)


def _limits(max_sparsity: Limits, layers: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """By layer."""
    one = 1.0 if max_sparsity is None else max_sparsity
    given = one if isinstance(one, Mapping) else dict.fromkeys(layers, one)
    found = _by_layer("max_sparsity", given, layers)
    for path, limit in given.items():
        if not 0 <= limit <= 1:
            raise ValueError(f"`max_sparsity` must be in [0, 1], got {limit} for {path!r}")
    return {name: float(found.get(name, 1.0)) for names in layers.values() for name in names}


def _by_layer(
    argument: str, given: Mapping[str, Any], layers: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    if unknown := unknown_layers(given, layers):
        known = ", ".join(
            path if len(names) == 1 else f"{path} ({names[0]} to {names[-1]})"
            for path, names in layers.items()
        )
        what = (
            "must name each layer that is pruned, and no other: see" if argument == "allocation" else "names"
        )
        raise ValueError(f"`{argument}` {what} {unknown[0]!r}, which is not pruned: {known}")
    return by_layer(given, layers)


def _check(scores: Mapping[str, Array], sparsity: Any, scope: str, pattern: Any) -> None:
    if not scores:
        raise ValueError(
            "`importance` holds no scores: every leaf is a single number, which `prune.scored` gives for "
            "what may not be pruned, such as biases and arrays of whole numbers. Score floating weights; "
            "pass quantized ones as floats: `.astype(jnp.float32)`, times their scale."
        )
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    check_pattern(pattern)
    if scope == "unit" and not isinstance(pattern, Unstructured):
        raise ValueError(
            f"`scope` 'unit' ranks the single weights of an output: {pattern} takes scope 'layer'"
        )
    _check_sparsity(sparsity, pattern)
    check_scores(scores)


def check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"`pattern` must be Unstructured(), Block, Units or NByM, got {pattern!r}")


def check_scores(scores: Mapping[str, Array]) -> None:
    """That they are numbers, none negative."""
    for path, score in scores.items():
        if isinstance(score, Tracer):
            continue
        if not _valid(score):
            raise ValueError(
                f"`importance` of {path!r} holds nan or negative scores: pass non-negative numbers"
            )


def _valid(score: Array) -> bool:
    # NumPy compiles nothing for each shape; it is slow at the dtypes that it has from elsewhere.
    native = np.dtype(score.dtype).kind in "biuf" and score.size
    if native and jax.default_backend() == "cpu" and getattr(score, "is_fully_addressable", True):
        return bool(np.min(np.asarray(score)) >= 0)
    return bool(jnp.all(score >= 0))


def _check_sparsity(sparsity: Any, pattern: Any) -> None:
    if isinstance(pattern, NByM):
        if sparsity is not None and not math.isclose(sparsity, pattern.sparsity):
            raise ValueError(
                f"`sparsity` is {pattern.sparsity:g} where {pattern.n} of {pattern.m} stay, got {sparsity}: "
                "leave it out"
            )
        return
    if isinstance(sparsity, Tracer):
        return
    if sparsity is None or not 0 <= float(sparsity) < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), the fraction to remove, got {sparsity}")


def _check_allocation(layers: Mapping[str, tuple[str, ...]], scope: str, allocation: Any) -> Any:
    """The allocation; fractions by layer."""
    if isinstance(allocation, Mapping):
        if scope == "global":
            raise ValueError("`allocation` by path is for scope 'layer' or 'unit'")
        found = _by_layer("allocation", allocation, layers)
        if missing := sorted({name for names in layers.values() for name in names} - found.keys()):
            raise ValueError(
                f"`allocation` must name each layer that is pruned, and no other: see {missing[0]!r}"
            )
        known_shares = {name: share for name, share in found.items() if not isinstance(share, Tracer)}
        wrong = [name for name, share in known_shares.items() if not 0 <= share < 1]
        if wrong:
            raise ValueError(f"`allocation` must be in [0, 1), got {found[wrong[0]]} for {wrong[0]!r}")
        return found
    known = ("uniform", "lamp") if scope == "global" else tuple(ALLOCATIONS)
    if allocation not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"`allocation` with scope {scope!r} must be one of {choices}, got {allocation!r}")
    return allocation


def _warn_of_collapse(groups: Mapping[str, _Grouped], kept: Mapping[str, Array]) -> None:
    for path, mask in kept.items():
        if isinstance(mask, Tracer):
            continue
        # NumPy reads what lies on the host where it is, and nothing is compiled for each shape.
        numpy = np.asarray(mask) if mask.is_fully_addressable else mask
        layers = groups[path].axes.layers
        left = numpy.any(tuple(axis for axis in range(mask.ndim) if axis not in layers))
        names = zip(groups[path].layers, np.ravel(left), strict=True)
        if empty := [name for name, some in names if not some]:
            these = ", ".join(map(repr, empty))
            warnings.warn(f"nothing of {these} is left: set `max_sparsity`", stacklevel=3)


def after_pruned(kept: Array, scores: Any) -> Any:
    """Scores of one leaf by which pruned weights are the lowest, and no other is as low."""
    if is_scores(scores):
        return scores.replace_boxed(after_pruned(kept, scores.value))
    if not jnp.ndim(scores):
        return scores
    # The order of scores is that of float32, whose zero must be left to them.
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return jnp.where(kept, jnp.maximum(wide, jnp.finfo(jnp.float32).tiny), 0)


def apply(params: Any, masks: Any) -> Any:
    """`params` with 0 where a mask is False.

    Raises:
        ValueError: the masks are of another tree, or of other shapes.

    >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"]
    Array([1., 0.], dtype=float32)
    """
    check_alike(params, masks)
    return jax.tree.map(_masked, params, masks)


def _masked(leaf: Array, mask: Array) -> Array:
    return jnp.where(laid_like(mask, leaf), leaf, jnp.zeros_like(leaf))


def straight_through(params: Any, masks: Any) -> Any:
    """`apply(params, masks)` in value, `params` in derivative: what is pruned is trained all the same.

    With w~ = mask w, the gradient of a weight is dL/dw~, mask or not. So the weights stay dense, each step
    goes by the loss of the pruned network, and masks that are made anew of the weights may bring one back.
    What a pruned weight gets is not the derivative of the loss, which is 0.

    Args:
        params: a tree of arrays.
        masks: shaped like `params`, True = kept; they may depend on `params`, and have no derivative.

    Returns:
        A tree like `params`: exactly 0 where a mask is False, exactly the weight where it is True.

    Raises:
        ValueError: the masks are of another tree, or of other shapes.

    References:
        Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013,
        arXiv:1308.3432; of pruned weights: Lin, Stich, Barba, Dmitriev and Jaggi, Dynamic Model Pruning with
        Feedback, 2020, arXiv:2006.07253

    >>> def loss(params):
    ...     kept = masks(scored(params), 0.5)
    ...     return jnp.sum(jnp.square(straight_through(params, kept)["w"] - 1))
    >>> jax.grad(loss)({"w": jnp.array([[0.5, 3.0]])})["w"]
    Array([[-2.,  4.]], dtype=float32)
    """
    check_alike(params, masks)
    return jax.tree.map(_through, params, masks)


@jax.custom_jvp
def _through(leaf: Array, mask: Array) -> Array:
    return _masked(leaf, mask)


_through.defjvps(lambda tangent, value, leaf, mask: tangent, None)


def check_alike(params: Any, tree: Any, name: str = "masks") -> None:
    """That masks, or what else the argument is called, are of these params."""
    leaves, given = named_leaves(params), named_leaves(tree)
    if leaves.keys() != given.keys():
        different = sorted(leaves.keys() ^ given.keys())[0]
        raise ValueError(f"`{name}` of other params: {different!r} is in one of them alone")
    for path, leaf in given.items():
        if jnp.shape(leaf) not in ((), jnp.shape(leaves[path])):
            raise ValueError(
                f"`{name}` of other params: {path!r} has shape {jnp.shape(leaf)} there and "
                f"{jnp.shape(leaves[path])} here"
            )


def sparsity(masks: Any) -> float:
    """The fraction that masks remove, of the leaves that may be pruned."""
    pruned = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    return 1 - sum(int(jnp.sum(mask)) for mask in pruned) / sum(mask.size for mask in pruned)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A mask in an eighth of its bytes. `flax.serialization` saves its shape beside its bits."""

    bits: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def _to_state(mask: Packed) -> dict[str, Any]:
    return {"bits": mask.bits, "shape": np.array(mask.shape, np.int64)}


def _from_state(target: Packed, state: Mapping[str, Any]) -> Packed:
    shape = tuple(int(length) for length in state["shape"])
    if shape != target.shape:
        raise ValueError(f"the saved mask has shape {shape}, and the target {target.shape}")
    return Packed(state["bits"], shape)


serialization.register_serialization_state(Packed, _to_state, _from_state)


def pack(masks: Any) -> Any:
    """Masks with eight weights to a byte.

    `flax.serialization.to_bytes` saves them; the target of `from_bytes` is any packed masks of these shapes.

    >>> pack({"w": jnp.ones((3, 5), bool)})["w"].bits.shape
    (2,)
    """
    return jax.tree.map(lambda mask: Packed(by_compiler(jnp.packbits, mask), jnp.shape(mask)), masks)


def unpack(packed: Any) -> Any:
    """What `pack` was given."""

    def one(mask: Packed) -> Array:
        size = int(np.prod(mask.shape))
        return jnp.unpackbits(mask.bits, count=size).astype(bool).reshape(mask.shape)

    return jax.tree.map(one, packed, is_leaf=lambda leaf: isinstance(leaf, Packed))
