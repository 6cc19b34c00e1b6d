"""Masks from importance: for each leaf, which weights to keep."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxeff.numerics.meshes import by_compiler, laid_like
from jaxeff.numerics.selection import lowest, lowest_of_each
from jaxeff.prune._allocation import ALLOCATIONS, MeasuredAllocation, lamp
from jaxeff.prune._layouts import Axes, axes_of, by_layer, by_path, layer_names, unboxed, unknown_layers
from jaxeff.prune._patterns import UNSTRUCTURED, NByM, Pattern, Unstructured
from jaxeff.report import Report
from jaxeff.statistics import Statistics

SCOPES = ("unit", "layer", "global")
Limits = float | Mapping[str, float] | None


def masks(
    importance: Any,
    sparsity: float | Array | None = None,
    *,
    scope: str = "layer",
    pattern: Pattern = UNSTRUCTURED,
    allocation: str | Mapping[str, float] | MeasuredAllocation = "uniform",
    max_sparsity: Limits = None,
) -> Any:
    """Choose which weights to keep, removing the least important.

    Exactly round(sparsity x groups) groups of the pattern are removed, from each layer or from all together; ties
    are removed by index.

    Args:
        importance: a tree of non-negative scores, such as from `scored`; a leaf that is a single number is not
            pruned.
        sparsity: the fraction to remove, in [0, 1), which may be traced. None for `NByM`, which has its own.
        scope: 'layer' prunes each layer separately, 'unit' the weights of each output separately, 'global' all
            weights in one order. Layers that a scan stacks in one leaf are layers, as in a report, if the scores
            come from statistics or a `prune.layout`; otherwise a leaf is a layer, and units are only known for
            kernels of two axes.
        pattern: `Unstructured()`, `Block(shape)`, `Units()` or `NByM(n, m)`. The last two follow the inputs
            or outputs of each weight, as given by the scores or by their `axes`.
        allocation: with scope 'layer' or 'unit', how to divide the sparsity among layers: 'uniform', 'erk',
            fractions by name ('blocks/q[3]', or 'blocks/q' for all layers of a leaf), such as from `owl`, or the
            result of `sensitivity`. With scope 'global', 'lamp' first makes the scores of layers comparable.
        max_sparsity: the largest fraction to remove from any layer, or from those named; with scope 'global'
            others make up for it.

    Returns:
        Masks, True = kept, shaped like `importance`.

    Raises:
        TypeError: `importance` is a report or statistics.
        ValueError: an argument is out of range, a pattern does not divide a leaf, or a score is nan or
            negative.

    Warns:
        UserWarning: nothing of a layer would be left.

    >>> masks({"a": jnp.array([3.0, 1.0, 2.0, 4.0]), "b": jnp.zeros(())}, 0.5)["a"]
    Array([ True, False, False,  True], dtype=bool)
    """
    if isinstance(importance, (Report, Statistics)):
        kind = type(importance).__name__
        raise TypeError(
            f"`importance` must be scores, as `prune.scored(params, statistics)` gives, got {kind}"
        )
    axes = dict(zip(by_path(unboxed(importance)), axes_of(importance), strict=True))
    importance = unboxed(importance)
    named = by_path(importance)
    scores = {path: score for path, score in named.items() if jnp.ndim(score)}
    if isinstance(allocation, MeasuredAllocation):
        allocation = allocation.allocation(sparsity)
    _check(scores, sparsity, scope, pattern)
    grouped = {path: _Grouped.of(path, score, axes[path], pattern) for path, score in scores.items()}
    layers = {path: group.layers for path, group in grouped.items()}
    shares = check_allocation(layers, scope, allocation)
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


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """One leaf with one score per group of weights that are removed together.

    Attributes:
        scores: of the groups, with the layers at the axes where the leaf has them; for `NByM` the mask.
        shape: of the leaf.
        axes: of the leaf, from the pattern or the scores.
        layers: names of the layers.
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
        """Shape of the groups of one layer."""
        return tuple(size for axis, size in enumerate(self.scores.shape) if axis not in self.axes.layers)

    def apart(self, scope: str) -> tuple[int, ...]:
        """Axes along which each index is pruned separately."""
        if scope == "layer":
            return tuple(sorted(self.axes.layers))
        if self.axes.units is None:
            raise ValueError(
                f"`scope` 'unit' compares the weights of an output, and {self.path!r}, shape {self.shape}, has "
                "different outputs in different uses: leave it out with `prunable`"
            )
        if not self.axes.units:
            raise ValueError(
                f"`scope` 'unit' needs to know the units of {self.path!r}, shape {self.shape}: score it with "
                "statistics of the model, or with `prunable=prune.layout(params, apply_fn, batch)`. If neither knows "
                "them, as the program uses slices of it, leave it out with `prunable`"
            )
        return tuple(sorted({*self.axes.layers, *self.axes.units}))

    def of_rows(self, by_name: Mapping[str, Any], scope: str, size: int) -> Any:
        """Return round(share x size) for each row, by the share of its layer; shaped like the axes `apart`."""
        counts = [counted(by_name[name], size) for name in self.layers]
        traced = any(isinstance(count, Tracer) for count in counts)
        each = jnp.stack(counts) if traced else np.array(counts, np.int32)
        apart = self.apart(scope)
        each = each.reshape([self.shape[axis] if axis in self.axes.layers else 1 for axis in apart])
        return jnp.broadcast_to(each, [self.shape[axis] for axis in apart])


def in_layers(function: Callable[[Array], Array], layers: tuple[int, ...]) -> Callable[[Array], Array]:
    """Apply a function to each layer of an array that stacks them along these axes."""
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
        # Weights that a layer must keep are removed after all others.
        scores[path] = jnp.where(may, scores[path], jnp.inf)
    traced = isinstance(count, Tracer)
    count = jnp.minimum(count, jnp.asarray(free, count.dtype)) if traced else min(count, free)
    removed = lowest([*scores.values()], count)
    return {path: ~mask for path, mask in zip(groups, removed, strict=True)}


def counted(share: Any, size: int) -> Any:
    """Return round(share x size), computed in float32 if the share is traced, which it stays if int32 is too short."""
    if isinstance(share, Tracer):
        found = jnp.round(share * float(size))
        return found if size > np.iinfo(np.int32).max else found.astype(jnp.int32)
    return round(float(share) * size)


def _at_most(share: Any, limit: float) -> Any:
    return jnp.minimum(share, limit) if isinstance(share, Tracer) else min(float(share), limit)


def _limits(max_sparsity: Limits, layers: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Return the limits by layer."""
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
            "`importance` holds no scores: every leaf is a single number, as `prune.scored` returns for "
            "leaves that may not be pruned, such as biases and whole numbers. Score floating weights; "
            "pass quantized ones as floats: `.astype(jnp.float32)`, times their scale."
        )
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    check_pattern(pattern)
    if scope == "unit" and not isinstance(pattern, Unstructured):
        raise ValueError(
            f"`scope` 'unit' ranks the single weights of an output: {pattern} needs scope 'layer'"
        )
    check_sparsity(sparsity, pattern)
    check_scores(scores)


def check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"`pattern` must be Unstructured(), Block, Units or NByM, got {pattern!r}")


def check_scores(scores: Mapping[str, Array]) -> None:
    """Check that scores are non-negative numbers."""
    for path, score in scores.items():
        if isinstance(score, Tracer):
            continue
        if not _valid(score):
            raise ValueError(
                f"`importance` of {path!r} holds nan or negative scores: pass non-negative numbers"
            )


def _valid(score: Array) -> bool:
    # NumPy compiles nothing per shape, but is slow at dtypes that are not its own.
    native = np.dtype(score.dtype).kind in "biuf" and score.size
    if native and jax.default_backend() == "cpu" and getattr(score, "is_fully_addressable", True):
        return bool(np.min(np.asarray(score)) >= 0)
    return bool(jnp.all(score >= 0))


def check_sparsity(sparsity: Any, pattern: Any) -> None:
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


def check_allocation(layers: Mapping[str, tuple[str, ...]], scope: str, allocation: Any) -> Any:
    """Check the allocation, and return fractions by layer."""
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
        # NumPy reads host arrays in place, and compiles nothing per shape.
        numpy = np.asarray(mask) if mask.is_fully_addressable else mask
        layers = groups[path].axes.layers
        left = numpy.any(tuple(axis for axis in range(mask.ndim) if axis not in layers))
        names = zip(groups[path].layers, np.ravel(left), strict=True)
        if empty := [name for name, some in names if not some]:
            these = ", ".join(map(repr, empty))
            warnings.warn(f"nothing of {these} is left: set `max_sparsity`", stacklevel=3)
