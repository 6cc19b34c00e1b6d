"""Low-rank updates (LoRA) of weights: what the network multiplies by is W + s B A, and W alone says little of it.

Qwix, Flax NNX and Keras name the factors after their weight. The factor s is in the program only, and is found from
one gradient: for any function of x W + s (x A) B, dL/dB = s A^T dL/dW. Factors that do not fit it are left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxeff.model.apply import Bound

# (end of the name of A, of B, and of the weight).
_NAMES = (
    ("lora_kernel_a", "lora_kernel_b", "kernel"),
    ("lora_embeddings_a", "lora_embeddings_b", "embeddings"),
    ("lora/lora_a", "lora/lora_b", "kernel"),
    ("_lora_a", "_lora_b", ""),
)
_FITS = 1e-3


@dataclasses.dataclass(frozen=True)
class Factors:
    """The paths of a weight and of the factors of its update: A, [inputs, rank], and B, [rank, units]."""

    weight: str
    a: str
    b: str


def factors(shapes: Mapping[str, tuple[int, ...]]) -> list[Factors]:
    """Return the weights that have a low-rank update, by the names of the leaves.

    >>> factors({"mlp/kernel": (4, 3), "mlp/kernel_lora_a": (4, 1), "mlp/kernel_lora_b": (1, 3)})
    [Factors(weight='mlp/kernel', a='mlp/kernel_lora_a', b='mlp/kernel_lora_b')]
    """
    found = []
    for path in shapes:
        ends = next((ends for ends in _NAMES if path.endswith(ends[0])), None)
        if ends is not None:
            stem = path.removesuffix(ends[0])
            found.append(Factors(stem + ends[2], path, stem + ends[1]))
    return [one for one in found if one.b in shapes and one.weight in shapes]


def effective(bound: Bound) -> dict[str, jax.Array]:
    """Return W + s B A by the path of W.

    Empty if there are no updates, if the model is traced, or if it has no gradient, as quantized weights have none.
    """
    named = dict(zip(bound.paths, jax.tree.leaves(bound.params), strict=True))
    pairs = factors({path: jnp.shape(leaf) for path, leaf in named.items()})
    if not pairs or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((named, bound.inputs))):
        return {}

    def mixed(some: Mapping[str, Any]) -> Any:
        leaves = [some.get(path, leaf) for path, leaf in named.items()]
        outputs = bound.plain(jax.tree.unflatten(jax.tree.structure(bound.params), leaves), bound.inputs)
        floating = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        # A plain sum would have no gradient behind a softmax.
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)) for leaf in floating)

    try:
        read = {path: named[path] for one in pairs for path in (one.weight, one.b)}
        gradient = jax.grad(mixed)(read)
    except (ValueError, TypeError, NotImplementedError):
        return {}
    found = {
        one: _sum(*(np.asarray(tree[path], np.float64) for tree, path in _read(one, named, gradient)))
        for one in pairs
    }
    return {
        one.weight: jnp.asarray(array, jnp.result_type(named[one.weight]))
        for one, array in found.items()
        if array is not None
    }


def _read(
    one: Factors, named: Mapping[str, Any], gradient: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], str]]:
    return [(named, one.weight), (named, one.a), (named, one.b), (gradient, one.weight), (gradient, one.b)]


def _sum(weight: Any, a: Any, b: Any, of_weight: Any, of_b: Any) -> np.ndarray | None:
    """Return W + s B A, or None if the gradients of W and B are not those of such a sum."""
    product = np.tensordot(a, b, 1)
    if product.size != weight.size:
        return None
    unscaled = np.tensordot(np.moveaxis(a, -1, 0), of_weight.reshape(product.shape), a.ndim - 1)
    square = np.sum(unscaled**2)
    scale = np.sum(unscaled * of_b) / square if square else 0.0
    if np.linalg.norm(scale * unscaled - of_b) > _FITS * np.linalg.norm(of_b):
        return None
    return weight + scale * product.reshape(weight.shape)
