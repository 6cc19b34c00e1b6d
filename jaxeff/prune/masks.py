"""Importance -> which weights stay: a mask for each leaf, True = kept.

Imports `allocation`, `patterns`, `selection`; of jaxeff `importance`, `leaves` and `meshes`.
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
from jax import Array
from jax.core import Tracer

from jaxeff import importance as criteria
from jaxeff.leaves import is_variables, named_leaves, split_variables
from jaxeff.meshes import by_compiler, laid_like
from jaxeff.prune.allocation import ALLOCATIONS, Measured, lamp
from jaxeff.prune.patterns import UNSTRUCTURED, NByM, Pattern
from jaxeff.prune.selection import lowest
from jaxeff.statistics import Statistics

Prunable = Callable[[str, Any], bool] | Mapping[str, bool] | None
Limits = float | Mapping[str, float] | None


def is_prunable(path: str, leaf: Any) -> bool:
    """Floating arrays of two axes or more, but for biases, scales and embeddings."""
    name = path.rsplit("/", 1)[-1]
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return floating and jnp.ndim(leaf) > 1 and name not in ("bias", "scale", "embedding")


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
        prunable: which leaves may be pruned: a function `(path, leaf) -> bool`, or exceptions from
            `is_prunable` by path.

    Returns:
        Scores where a leaf may be pruned; a number, 0, where it may not. With statistics, that is so of
        arrays that multiply no data, such as learned positions.

    Raises:
        ValueError: a path of `prunable` is none of the leaves', or has no scores; or the criterion needs
            statistics.

    >>> scored({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)})["kernel"]
    Array([[1., 2.]], dtype=float32)
    """
    core, _ = split_variables(params)
    named = named_leaves(core)
    chosen = prunable_paths(prunable, named)
    if statistics is not None:
        found = criteria.scores(params, statistics, criterion)
        if missing := sorted(_asked_for(prunable, chosen) - found.keys()):
            raise ValueError(
                f"`prunable` asks for {missing[0]!r}, which multiplies no data and has no scores"
            )
        chosen &= found.keys()
    elif criteria.named(criterion).function is criteria.magnitude:
        found = {path: jnp.abs(leaf) for path, leaf in named.items()}
    else:
        raise ValueError(f"`statistics` are missing: criterion {criterion!r} is made of them")
    scores = [found[path] if path in chosen else jnp.zeros(()) for path in named]
    tree = jax.tree.unflatten(jax.tree.structure(core), scores)
    if core is params:
        return tree
    return {**jax.tree.map(lambda leaf: jnp.zeros(()), dict(params)), "params": tree}


def _asked_for(prunable: Prunable, chosen: set[str]) -> set[str]:
    """The leaves that the user named."""
    if callable(prunable):
        return chosen
    return {path for path, may in (prunable or {}).items() if may}


def prunable_paths(prunable: Prunable, named: Mapping[str, Any]) -> set[str]:
    """The leaves that may be pruned."""
    if callable(prunable):
        return {path for path, leaf in named.items() if prunable(path, leaf)}
    exceptions = dict(prunable or {})
    if unknown := exceptions.keys() - named.keys():
        raise ValueError(f"`prunable` names {sorted(unknown)[0]!r}, which is no leaf: {', '.join(named)}")
    return {path for path, leaf in named.items() if exceptions.get(path, is_prunable(path, leaf))}


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
        scope: 'layer' removes from each leaf by itself, 'global' in one order over all.
        pattern: `Unstructured()`, `Block(shape)`, `Units()` or `NByM(n, m)`.
        allocation: with scope 'layer', how much of each: 'uniform', 'erk', fractions by path, or what
            `sensitivity` measured. With scope 'global', 'lamp' makes the scores of layers comparable first.
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
    named = _by_path(importance)
    scores = {path: score for path, score in named.items() if jnp.ndim(score)}
    if isinstance(allocation, Measured):
        allocation = allocation.allocation(sparsity)
    _check(scores, sparsity, scope, pattern, allocation)
    if isinstance(pattern, NByM):
        kept = {path: pattern.kept(score, path) for path, score in scores.items()}
    else:
        groups = {path: pattern.groups(score, path) for path, score in scores.items()}
        select = _of_all if scope == "global" else _of_each
        chosen = select(groups, sparsity, allocation, _limits(max_sparsity, groups))
        kept = {
            path: laid_like(pattern.expanded(mask, scores[path].shape), scores[path])
            for path, mask in chosen.items()
        }
    _warn_of_collapse(kept)
    leaves = [kept.get(path, jnp.asarray(True)) for path in named]
    return jax.tree.unflatten(jax.tree.structure(importance), leaves)


def _by_path(importance: Any) -> dict[str, Any]:
    """The leaves by path; those of the `params` collection of variables by their path below it."""
    named = named_leaves(importance)
    above = "params/" if is_variables(importance) else ""
    return {path.removeprefix(above): leaf for path, leaf in named.items()}


def _of_each(
    groups: dict[str, Array], sparsity: Any, allocation: Any, limits: dict[str, float]
) -> dict[str, Array]:
    shapes = {path: score.shape for path, score in groups.items()}
    shares = ALLOCATIONS[allocation](shapes, sparsity) if isinstance(allocation, str) else allocation
    return {
        path: ~lowest([score], counted(_at_most(shares[path], limits[path]), score.size))[0]
        for path, score in groups.items()
    }


def _of_all(
    groups: dict[str, Array], sparsity: Any, allocation: Any, limits: dict[str, float]
) -> dict[str, Array]:
    if allocation == "lamp":
        groups = {path: lamp(score) for path, score in groups.items()}
    count = counted(sparsity, sum(score.size for score in groups.values()))
    open_ = dict(groups)
    free = 0
    for path, score in groups.items():
        most = counted(limits[path], score.size)
        free += most
        if most < score.size:
            # What a layer must keep goes after everything else.
            open_[path] = jnp.where(lowest([score], most)[0], score, jnp.inf)
    removed = lowest([*open_.values()], jnp.minimum(count, free))
    return {path: ~mask for path, mask in zip(groups, removed, strict=True)}


def counted(share: Any, size: int) -> Any:
    """round(share x size); in float32 where the share is traced."""
    if isinstance(share, Tracer):
        return jnp.round(share * size).astype(jnp.int32)
    return round(float(share) * size)


def _at_most(share: Any, limit: float) -> Any:
    return jnp.minimum(share, limit) if isinstance(share, Tracer) else min(float(share), limit)


def _limits(max_sparsity: Limits, groups: Mapping[str, Array]) -> dict[str, float]:
    one = 1.0 if max_sparsity is None else max_sparsity
    given = one if isinstance(one, Mapping) else dict.fromkeys(groups, one)
    if unknown := given.keys() - groups.keys():
        raise ValueError(
            f"`max_sparsity` names {sorted(unknown)[0]!r}, which is not pruned: {', '.join(groups)}"
        )
    for path, limit in given.items():
        if not 0 <= limit <= 1:
            raise ValueError(f"`max_sparsity` must be in [0, 1], got {limit} for {path!r}")
    return {path: float(given.get(path, 1.0)) for path in groups}


def _check(scores: Mapping[str, Array], sparsity: Any, scope: str, pattern: Any, allocation: Any) -> None:
    if not scores:
        raise ValueError(
            "`importance` holds no scores: every leaf is a single number, which `prune.scored` gives for "
            "what may not be pruned, such as biases and arrays of whole numbers. Score floating weights; "
            "pass quantized ones as floats: `.astype(jnp.float32)`, times their scale."
        )
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}")
    check_pattern(pattern)
    _check_sparsity(sparsity, pattern)
    _check_allocation(scores, scope, allocation)
    check_scores(scores)


def check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"`pattern` must be Unstructured(), Block, Units or NByM, got {pattern!r}")


def check_scores(scores: Mapping[str, Array]) -> None:
    """That they are numbers, none negative."""
    for path, score in scores.items():
        if isinstance(score, Tracer):
            continue
        if not bool(jnp.all(score >= 0)):
            raise ValueError(
                f"`importance` of {path!r} holds nan or negative scores: pass non-negative numbers"
            )


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


def _check_allocation(scores: Mapping[str, Array], scope: str, allocation: Any) -> None:
    if isinstance(allocation, Mapping):
        if scope == "global":
            raise ValueError("`allocation` by path is for scope 'layer'")
        if allocation.keys() != scores.keys():
            different = sorted(allocation.keys() ^ scores.keys())[0]
            raise ValueError(
                f"`allocation` must name each leaf that is pruned, and no other: see {different!r}"
            )
        known_shares = {path: share for path, share in allocation.items() if not isinstance(share, Tracer)}
        wrong = [path for path, share in known_shares.items() if not 0 <= share < 1]
        if wrong:
            raise ValueError(f"`allocation` must be in [0, 1), got {allocation[wrong[0]]} for {wrong[0]!r}")
        return
    known = ("uniform", "lamp") if scope == "global" else tuple(ALLOCATIONS)
    if allocation not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"`allocation` with scope {scope!r} must be one of {choices}, got {allocation!r}")


def _warn_of_collapse(kept: Mapping[str, Array]) -> None:
    for path, mask in kept.items():
        if not isinstance(mask, Tracer) and not bool(jnp.any(mask)):
            warnings.warn(f"nothing of {path!r} is left: set `max_sparsity`", stacklevel=3)


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
    """A mask in an eighth of its bytes."""

    bits: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def pack(masks: Any) -> Any:
    """Masks with eight weights to a byte.

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
