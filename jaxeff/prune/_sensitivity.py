"""The measured loss with one layer at a time pruned."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxeff._saving import saved_by_flax
from jaxeff.model import apply as models
from jaxeff.model import objective as objectives
from jaxeff.model.adapters import resolve_both
from jaxeff.model.objective import Arrays, Objective
from jaxeff.model.params import Params, named_leaves, split_variables
from jaxeff.model.roles import whole_numbers
from jaxeff.numerics.meshes import by_compiler, laid_like
from jaxeff.numerics.precision import widened
from jaxeff.numerics.selection import Threshold, below, thresholds
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.prune._layouts import Axes, Layout, axes_of, layer_names, of_model, unboxed
from jaxeff.prune._masking import check_alike
from jaxeff.prune._masks import check_pattern, check_scores, counted, in_layers
from jaxeff.prune._patterns import UNSTRUCTURED, Block, NByM, Pattern, Units, Unstructured
from jaxeff.prune._scoring import Prunable, prunable_paths
from jaxeff.report._limits import LIMITS
from jaxeff.statistics.weight_loss import WeightLoss, floating

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)

_STATIC = {"static": True}


@saved_by_flax
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """The loss with each layer pruned alone. `str(sensitivity)` is a table.

    Attributes:
        paths: of the layers: leaves of `params`, or 'blocks/q[3]' for one that a scan stacks, as in a report.
        sizes: number of weights of each layer.
        sparsities: fractions removed, increasing.
        scores: order of removal: 'magnitude', or 'importance' for scores of your own.
        pattern: which weights were removed together.
        losses: [layers, sparsities], mean loss with that fraction of that layer at 0 and the other layers whole.
        dense: [], mean loss with nothing removed.
    """

    paths: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    sizes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    sparsities: tuple[float, ...] = dataclasses.field(metadata=_STATIC)
    scores: str = dataclasses.field(metadata=_STATIC)
    pattern: Pattern = dataclasses.field(metadata=_STATIC)
    losses: Array
    dense: Array

    def highest(self, tolerance: float = 0.0) -> dict[str, float]:
        """Return the highest measured sparsity up to which each layer's loss stays within a tolerance.

        A layer that fails at one sparsity fails at all higher ones.

        Args:
            tolerance: rise above the dense loss, in units of the loss.

        Returns:
            By path, a measured sparsity; 0 if there is none.

        Raises:
            ValueError: the tolerance is negative or nan.

        >>> found = Sensitivity(("w",), (8,), (0.5, 0.9), "magnitude", UNSTRUCTURED,
        ...                     jnp.array([[1.0, 3.0]]), jnp.array(1.0))
        >>> found.highest(0.5), found.highest(2.0)
        ({'w': 0.5}, {'w': 0.9})
        """
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must be 0 or more, in units of the loss, got {tolerance}")
        held = np.sum(self.rises() <= tolerance, axis=1)
        return {path: (0.0, *self.sparsities)[n] for path, n in zip(self.paths, held.tolist(), strict=True)}

    def allocation(self, sparsity: float | Array) -> dict[str, Any]:
        """Divide a sparsity among the layers so that the loss rises equally in each.

        Between measured sparsities the rise is assumed to be linear, from 0 at 0; falls of the loss count as level.
        Each layer is pruned as far as one common rise allows, which is raised until the total is met, but never beyond
        the last sparsity measured with a finite loss.

        Args:
            sparsity: the fraction of all measured weights, in [0, 1). If it is traced, values out of reach count as
                the largest that can be reached.

        Returns:
            Fractions by path, for the `allocation` of `prune.masks`, which also takes the `Sensitivity` itself.

        Raises:
            ValueError: the sparsity is out of range, or beyond the measured ones.

        >>> found = Sensitivity(("a", "b"), (8, 8), (0.5, 0.8), "magnitude", UNSTRUCTURED,
        ...                     jnp.array([[1.1, 1.2], [1.2, 2.0]]), jnp.array(1.0))
        >>> {path: round(share, 2) for path, share in found.allocation(0.65).items()}
        {'a': 0.8, 'b': 0.5}
        """
        totals, shares = self.allocations()
        columns = zip(self.paths, shares.T, strict=True)
        if isinstance(sparsity, Tracer):
            return {path: jnp.interp(sparsity, totals, column) for path, column in columns}
        if sparsity is None or not 0 <= float(sparsity) < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), the fraction to remove, got {sparsity}")
        if float(sparsity) > totals[-1] + 1e-6:
            raise ValueError(
                f"`sparsity` {float(sparsity):g} is out of reach: the measured sparsities give at most "
                f"{totals[-1]:.6g}; measure higher ones"
            )
        return {path: float(np.interp(float(sparsity), totals, column)) for path, column in columns}

    def table(self, tolerance: float | None = None) -> str:
        """Return a table with a row per layer: its loss by sparsity, and the highest sparsity within the tolerance.

        Args:
            tolerance: in units of the loss; a tenth of the dense loss by default.
        """
        return _render(self, self.tolerance if tolerance is None else tolerance)

    @property
    def order(self) -> str:
        """The order of removal and the pattern, in words."""
        return self.scores if self.pattern == UNSTRUCTURED else f"{self.scores} in {self.pattern}"

    @property
    def tolerance(self) -> float:
        """The rise of the loss that the table and the recommendations allow: a tenth of the dense loss."""
        return LIMITS.loss_rise * abs(float(self.dense))

    def rises(self) -> np.ndarray:
        """Return [layers, sparsities]: the largest rise above the dense loss up to that sparsity.

        0 if the loss only fell, infinity if it was nan.
        """
        rises = np.asarray(self.losses, np.float64) - float(self.dense)
        return np.maximum.accumulate(np.where(np.isnan(rises), np.inf, np.maximum(rises, 0)), axis=1)

    def __str__(self) -> str:
        return self.table()

    def allocations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all allocations of equal rise, at the corners between which they are linear.

        Returns:
            [corners], fraction of all weights removed, ascending, and [corners, layers], fraction of each layer.
        """
        sparsities = np.array((0.0, *self.sparsities))
        rises = np.pad(self.rises(), ((0, 0), (1, 0)))
        corners = np.unique(rises[np.isfinite(rises)])
        # A layer whose loss is level jumps at one rise, from just below it to just above.
        sides = [[_reached(own, sparsities, corners, side) for side in ("left", "right")] for own in rises]
        shares = np.moveaxis(np.array(sides), 0, -1).swapaxes(0, 1).reshape(-1, len(rises))
        weights = np.array(self.sizes, np.float64)
        return shares @ weights / weights.sum(), shares


def _reached(rises: np.ndarray, sparsities: np.ndarray, allowed: np.ndarray, side: Any) -> np.ndarray:
    """Return the sparsity at which a layer's rise meets the limit ('left'), or exceeds it ('right')."""
    after = np.searchsorted(rises, allowed, side)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(rises) - 1)
    span = rises[after] - rises[before]
    part = np.where(span > 0, allowed - rises[before], 0) / np.where(span > 0, span, 1)
    return sparsities[before] + part * (sparsities[after] - sparsities[before])


def sensitivity(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    loss_fn: Callable,
    targets: Any,
    importance: Any = None,
    pattern: Pattern = UNSTRUCTURED,
    prunable: Prunable = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Sensitivity:
    """Prune each layer alone, to each sparsity, and measure the loss without retraining.

    The weights removed are those that `prune.masks(importance, sparsity, pattern=pattern)` removes from that layer.
    The model is compiled once and run 1 + layers x sparsities times, in a loop with one copy of the weights.

    Args:
        params, apply_fn, batch: as in `jaxeff.analyze`.
        sparsities: of the pruned layer, increasing, in [0, 1).
        loss_fn, targets: as in `jaxeff.analyze`.
        importance: a tree of scores, such as from `prune.scored`; magnitudes by default. Leaves that are a single
            number are not pruned.
        pattern: as in `prune.masks`; inputs and outputs come from this model unless the pattern names them. `NByM`
            has one sparsity, its own.
        prunable: as in `prune.scored`, for magnitudes.
        rngs, **apply_kwargs: passed to `apply_fn`, the same in each run.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, the arguments do not match each other, a score is nan, or the loss is
            not finite before anything is removed.

    >>> w, x = jnp.array([[3.0], [1e-3]]), jnp.eye(2)
    >>> loss = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))
    >>> model = lambda params, x: x @ params["w"]
    >>> found = sensitivity({"w": w}, model, x, (0.5,), loss_fn=loss, targets=w + 1)
    >>> found.dense.round(2), found.losses.round(2)
    (Array(1., dtype=float32), Array([[1.]], dtype=float32))
    """
    check_pattern(pattern)
    fractions = _checked_sparsities(sparsities, pattern)
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    params = Params.of(params)
    model, named = models.from_apply(params, apply_fn, batch, rngs, apply_kwargs), params.named
    layout = prunable if isinstance(prunable, Layout) else of_model(model)
    chosen = _chosen(params, importance, prunable, layout)
    known = _axes(importance, layout, named, tuple(chosen), pattern)
    objective, arrays = objectives.objective(model, loss_fn, targets, chosen)
    groups, found, names = [], [], []
    for axes, (path, given) in zip(known, chosen.items(), strict=True):
        score = _magnitude(path, named[path]) if given is None else given
        check_scores({path: score})
        group, of_layers = _grouped(path, score, axes, pattern, fractions)
        found.append(of_layers)
        names.append(layer_names(path, jnp.shape(score), axes.layers))
        # Magnitudes of single weights are computed where they are read, so that no copy is kept.
        groups.append(None if given is None and isinstance(pattern, Unstructured) else group)
    stacked = jax.tree.map(lambda *rows: jnp.concatenate(rows), *found)
    stacks = tuple(axes.layers for axes in known)
    whole = UNSTRUCTURED if isinstance(pattern, NByM) else pattern
    dense, losses = _losses(objective, whole, stacks, model.params, arrays, groups, stacked)
    check_dense(dense, {"params": model.params, "batch": batch, "targets": targets})
    return Sensitivity(
        tuple(itertools.chain(*names)),
        tuple(
            int(np.prod(jnp.shape(named[path]))) // len(own)
            for path, own in zip(chosen, names, strict=True)
            for _ in own
        ),
        fractions,
        "magnitude" if importance is None else "importance",
        pattern,
        losses,
        dense,
    )


def _chosen(params: Params, importance: Any, prunable: Prunable, layout: Layout) -> dict[str, Array | None]:
    """Return the leaves to prune with their scores, in the order of the params; None stands for magnitudes."""
    if importance is None:
        paths = prunable_paths(prunable, params.named, layout)
        found: dict[str, Array | None] = dict.fromkeys([path for path in params.named if path in paths])
    elif prunable is not None:
        raise ValueError("`prunable` is for magnitudes: pass it to `prune.scored`, which makes `importance`")
    else:
        scores, _ = split_variables(unboxed(importance))
        check_alike(params.tree, scores, "importance")
        found = {path: score for path, score in named_leaves(scores).items() if jnp.ndim(score)}
    if not found:
        argument = "prunable" if importance is None else "importance"
        hint = whole_numbers(params.described())
        raise ValueError(f"`{argument}` leaves nothing to prune of {', '.join(params.named)}.{hint}")
    return found


def _axes(
    importance: Any, layout: Layout, named: Mapping[str, Any], chosen: tuple[str, ...], pattern: Pattern
) -> tuple[Axes, ...]:
    """Return the axes of each leaf, from the pattern, the scores, or else the program."""
    boxed = {}
    if importance is not None:
        scores, _ = split_variables(importance)
        boxed = dict(zip(named_leaves(unboxed(scores)), axes_of(scores), strict=True))
    return tuple(pattern.located(path, named[path], boxed.get(path) or layout[path].axes) for path in chosen)


def _checked_sparsities(sparsities: Sequence[float], pattern: Pattern) -> tuple[float, ...]:
    found = tuple(float(sparsity) for sparsity in sparsities)
    increasing = all(a < b for a, b in itertools.pairwise(found))
    if not found or not increasing or not 0 <= found[0] <= found[-1] < 1:
        raise ValueError(f"`sparsities` must be one or more increasing numbers in [0, 1), got {sparsities!r}")
    if isinstance(pattern, NByM) and not (len(found) == 1 and math.isclose(found[0], pattern.sparsity)):
        raise ValueError(
            f"`sparsities` must be ({pattern.sparsity:g},) where {pattern.n} of {pattern.m} stay, got "
            f"{sparsities!r}"
        )
    return found


def _magnitude(path: str, weight: Array) -> Array:
    if not isinstance(weight, Tracer) and bool(jnp.any(jnp.isnan(weight))):
        raise ValueError(f"`params` hold nan at {path!r}: magnitudes have no order")
    return jnp.abs(weight)


def _grouped(
    path: str, score: Array, axes: Axes, pattern: Pattern, sparsities: Sequence[float]
) -> tuple[Array, Threshold]:
    """Return scores of the groups, and [layers, sparsities] thresholds up to which they are removed."""
    grouped = pattern.kept if isinstance(pattern, NByM) else pattern.groups
    of_layers = in_layers(lambda layer: grouped(layer, path, axes.of_layer), axes.layers)
    group = by_compiler(of_layers, score, like=score)
    if isinstance(pattern, NByM):
        # The lowest scores are removed.
        group = group.astype(jnp.float32)
    size = group.size // math.prod(group.shape[axis] for axis in axes.layers)
    counts = np.array([counted(sparsity, size) for sparsity in sparsities], np.int32)
    return group, jax.tree.map(jnp.transpose, thresholds(group, counts, axes.layers))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(
    objective: Objective,
    pattern: Unstructured | Block | Units,
    stacks: tuple[tuple[int, ...], ...],
    params: Any,
    arrays: Arrays,
    groups: list[Array | None],
    found: Threshold,
) -> tuple[Array, Array]:
    """Return the mean loss of the whole model, [], and with one layer pruned, [layers, sparsities]."""
    weight_loss = WeightLoss(objective, params, arrays)

    def loss(run: tuple[Array, Array, Threshold]) -> Array:
        leaf, row, threshold = run
        # Under a condition, the keys of the scores are made for one layer only, and not kept between runs.
        weights = [
            jax.lax.cond(
                leaf == i,
                functools.partial(_pruned, pattern, axes),
                lambda weight, *_: weight,
                *(weight, group, threshold, row),
            )
            for i, (weight, group, axes) in enumerate(zip(weight_loss.weights, groups, stacks, strict=True))
        ]
        return widened(weight_loss.mean_loss(tuple(weights)))

    layers, sparsities = found.limit.shape
    numbers = [
        (leaf, row)
        for leaf, (weight, axes) in enumerate(zip(weight_loss.weights, stacks, strict=True))
        for row in range(math.prod(weight.shape[axis] for axis in axes))
    ]
    # The first run prunes no layer.
    runs = np.array([(-1, 0), *(number for number in numbers for _ in range(sparsities))], np.int32)
    each = jax.tree.map(lambda part: jnp.pad(part.ravel(), (1, 0)), found)
    losses = jax.lax.map(loss, (jnp.asarray(runs[:, 0]), jnp.asarray(runs[:, 1]), each))
    return losses[0], losses[1:].reshape(layers, sparsities)


def _pruned(
    pattern: Unstructured | Block | Units,
    layers: tuple[int, ...],
    weight: Array,
    group: Array | None,
    found: Threshold,
    row: Array,
) -> Array:
    shape = tuple(size for axis, size in enumerate(jnp.shape(weight)) if axis not in layers)
    removed = below(jnp.abs(weight) if group is None else group, found, layers, row)
    expanded = in_layers(lambda layer: pattern.expanded(layer, shape), layers)
    gone = laid_like(by_compiler(expanded, removed, like=removed), weight)
    return jnp.where(gone, jnp.zeros_like(weight), weight)


def check_dense(dense: Array, given: Mapping[str, Any]) -> None:
    if isinstance(dense, Tracer) or bool(jnp.isfinite(dense)):
        return
    culprits = [
        f"`{name}` is not finite at {jax.tree_util.keystr(path)}" if path else f"`{name}` is not finite"
        for name, tree in given.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if floating(leaf) and not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    cause = culprits[0] if culprits else "`params`, `batch` and `targets` are finite: look at `loss_fn`"
    raise ValueError(f"the loss is {float(dense)} before anything is removed. {cause}")


def _render(found: Sensitivity, tolerance: float) -> str:
    highest = found.highest(tolerance)
    header = ("layer", "weights", *(_percent(sparsity) for sparsity in found.sparsities), "within")
    rows = [
        (path, text.number(size), *map(_number, losses), _percent(highest[path]))
        for path, size, losses in zip(
            found.paths, found.sizes, np.asarray(found.losses, np.float64).tolist(), strict=True
        )
    ]
    note = (
        f"Loss by fraction of the layer removed, alone, by {found.order}; whole: "
        f"{_number(float(found.dense))}. within: the highest measured up to which the loss rises by at most "
        f"{_number(tolerance)}."
    )
    return "\n".join([*text.aligned([header, *rows], text.WIDTH), "", *text.wrapped(note, text.WIDTH)])


def _number(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.3g}"


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.3g}%"
