"""Masks applied to weights, counted and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import Array
from jax.core import Tracer

from jaxeff.model.params import named_leaves
from jaxeff.numerics.meshes import by_compiler, laid_like


def apply(params: Any, masks: Any) -> Any:
    """Set the entries of `params` to 0 where a mask is False.

    Raises:
        ValueError: the masks have another tree or other shapes, or are neither booleans nor zeros and ones.

    >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"]
    Array([1., 0.], dtype=float32)
    """
    check_masks(params, masks)
    return jax.tree.map(_masked, params, masks)


def _masked(leaf: Array, mask: Array) -> Array:
    return jnp.where(laid_like(mask, leaf), leaf, jnp.zeros_like(leaf))


def straight_through(params: Any, masks: Any) -> Any:
    """Apply masks, but pass gradients straight through to `params`, so that pruned weights are trained too.

    With w~ = mask w, the gradient of a weight is dL/dw~, masked or not. So the weights stay dense, each step
    follows the loss of the pruned network, and masks recomputed from the weights may restore one. The gradient of
    a pruned weight is not the derivative of the loss, which is 0.

    Args:
        params: a tree of arrays.
        masks: shaped like `params`, True = kept; they may depend on `params`, and have no derivative.

    Returns:
        A tree like `params`: exactly 0 where a mask is False, exactly the weight where it is True.

    Raises:
        ValueError: the masks have another tree or other shapes, or are neither booleans nor zeros and ones.

    References:
        Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013,
        arXiv:1308.3432; for pruned weights: Lin, Stich, Barba, Dmitriev and Jaggi, Dynamic Model Pruning with
        Feedback, 2020, arXiv:2006.07253

    >>> from jaxeff.prune import masks, scored
    >>> def loss(params):
    ...     kept = masks(scored(params), 0.5)
    ...     return jnp.sum(jnp.square(straight_through(params, kept)["w"] - 1))
    >>> jax.grad(loss)({"w": jnp.array([[0.5, 3.0]])})["w"]
    Array([[-2.,  4.]], dtype=float32)
    """
    check_masks(params, masks)
    return jax.tree.map(_through, params, masks)


@jax.custom_jvp
def _through(leaf: Array, mask: Array) -> Array:
    return _masked(leaf, mask)


_through.defjvps(lambda tangent, value, leaf, mask: tangent, None)


def check_masks(params: Any, masks: Any, name: str = "masks") -> None:
    """Check that masks match the params, and are not scores or weights."""
    check_alike(params, masks, name)
    for path, mask in named_leaves(masks).items():
        floating = jnp.issubdtype(jnp.result_type(mask), jnp.inexact) and not isinstance(mask, Tracer)
        if floating and not bool(jnp.all((mask == 0) | (mask == 1))):
            raise ValueError(
                f"`{name}` must be True or 1 where a weight is kept, and False or 0 where not, and {path!r} holds "
                "other numbers: make masks of scores with `prune.masks`"
            )


def check_alike(params: Any, tree: Any, name: str) -> None:
    """Check that a tree, named by its argument, matches the params."""
    leaves, given = named_leaves(params), named_leaves(tree)
    if leaves.keys() != given.keys():
        different = sorted(leaves.keys() ^ given.keys())[0]
        raise ValueError(f"`{name}` must match the params: {different!r} is in only one of them")
    for path, leaf in given.items():
        if jnp.shape(leaf) not in ((), jnp.shape(leaves[path])):
            raise ValueError(
                f"`{name}` must match the params: {path!r} has shape {jnp.shape(leaf)} there and "
                f"{jnp.shape(leaves[path])} here"
            )


def sparsity(masks: Any) -> float:
    """Return the fraction of weights that masks remove, among the leaves that may be pruned."""
    pruned = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    return 1 - sum(int(jnp.sum(mask)) for mask in pruned) / sum(mask.size for mask in pruned)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A mask in an eighth of its bytes. `flax.serialization` saves its bits with their shape."""

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
    """Pack masks with eight weights per byte.

    `flax.serialization.to_bytes` saves them; the target of `from_bytes` may be any packed masks of these shapes.

    >>> pack({"w": jnp.ones((3, 5), bool)})["w"].bits.shape
    (2,)
    """
    return jax.tree.map(lambda mask: Packed(by_compiler(jnp.packbits, mask), jnp.shape(mask)), masks)


def unpack(packed: Any) -> Any:
    """Unpack masks packed by `pack`."""

    def one(mask: Packed) -> Array:
        size = int(np.prod(mask.shape))
        return jnp.unpackbits(mask.bits, count=size).astype(bool).reshape(mask.shape)

    return jax.tree.map(one, packed, is_leaf=lambda leaf: isinstance(leaf, Packed))
