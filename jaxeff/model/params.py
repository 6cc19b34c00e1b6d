"""The arrays that a user passes as `params` or `batch`: their names, and checks."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata

from jaxeff.model.roles import ParamInfo, role_of

Path = str
_STATIC = {"static": True}
# `equinox.filter` makes a module of arrays alone, which is not a model but params.
_MODELS = (("keras", "Layer"), ("penzai", "Layer"), ("equinox", "Module"))
_BOXES = (nnx.Variable, AxisMetadata)  # wrap one value, as nn.Partitioned and nnx.Param do


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Params:
    """A user's `params`, split, named and checked once, and then passed down.

    Attributes:
        tree: the parameters alone.
        paths: of their leaves, in the order of `jax.tree.leaves`.
        state: the other collections of a variables dict; empty if there are none.
        is_variables: whether they came in a variables dict, which the model's function then expects.
    """

    tree: Any
    paths: tuple[Path, ...] = dataclasses.field(metadata=_STATIC)
    state: dict[str, Any]
    is_variables: bool = dataclasses.field(metadata=_STATIC)

    @staticmethod
    def of(params: Any, *, abstract: bool = False) -> Params:
        """Split, name and check a user's `params`; return `Params` unchanged.

        Args:
            abstract: whether a `jax.ShapeDtypeStruct` may replace an array.

        Raises:
            TypeError: a leaf is not an array of numbers, or the params are a whole model.
            ValueError: there are no leaves, or two have the same path.

        >>> found = Params.of({"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}})
        >>> found.paths, found.state
        (('w',), {'batch_stats': {'mean': 0.0}})
        """
        if isinstance(params, Params):
            return params
        tree, state = split_variables(params)
        named = named_leaves(tree, abstract=abstract)
        for path, leaf in named.items():
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise TypeError(
                    f"`params` holds a random key at {path!r}: pass the parameters alone, as "
                    "`nnx.state(model, nnx.Param)` gives them, or the model, (model, batch); or leave the key out"
                )
        return Params(tree, tuple(named), state, is_variables(params))

    @functools.cached_property
    def named(self) -> dict[Path, Any]:
        """The leaves by path."""
        return dict(zip(self.paths, jax.tree.leaves(self.tree), strict=True))

    def described(self) -> list[tuple[Path, tuple[int, ...], str]]:
        """Path, shape and dtype of each leaf."""
        return [(path, jnp.shape(leaf), str(jnp.result_type(leaf))) for path, leaf in self.named.items()]

    def by_shape(self) -> tuple[ParamInfo, ...]:
        """Return the role of each leaf without a program."""
        return tuple(
            ParamInfo(path, jnp.shape(leaf), str(dtype), role_of(path, jnp.shape(leaf), dtype), None)
            for path, leaf in self.named.items()
            for dtype in [jnp.result_type(leaf)]
        )


def split_variables(params: Any) -> tuple[Any, dict[str, Any]]:
    """Split a variables dict into its `params` collection and its other collections.

    >>> split_variables({"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}})
    ({'w': 1.0}, {'batch_stats': {'mean': 0.0}})
    """
    if is_variables(params):
        # This run would append to intermediates left over from `init`, which would shadow its own.
        rest = {name: value for name, value in params.items() if name not in ("params", "intermediates")}
        return params["params"], rest
    return params, {}


def is_variables(params: Any) -> bool:
    """Return whether these are Linen variables, rather than one collection or an NNX state."""
    return isinstance(params, Mapping) and not isinstance(params, nnx.State) and "params" in params


def named_leaves(params: Any, *, abstract: bool = False) -> dict[Path, Any]:
    """Return the leaves of `params` by path ('block_0/Dense_0/kernel'), each checked to be an array.

    Args:
        abstract: whether a `jax.ShapeDtypeStruct` may replace an array.

    Raises:
        TypeError: a leaf is not an array of numbers.
        ValueError: there are no leaves, or two have the same path.
    """
    if hasattr(params, "apply_fn") and hasattr(params, "params"):
        raise TypeError(
            f"`params` is a {type(params).__name__}: pass it alone, (state, batch), or its `.params`"
        )
    if isinstance(params, nnx.Module):
        raise _is_model(params)
    named: dict[Path, Any] = {}
    for path, leaf in leaves_by_path(params):
        if not is_array(leaf, abstract=abstract):
            where = f"holds a {type(leaf).__name__} at {path!r}" if path else f"is a {type(leaf).__name__}"
            if any(is_a(params, *names) for names in _MODELS):
                raise _is_model(params)
            order = ", and `apply_fn` comes after it" if callable(leaf) and not path else ""
            is_file = isinstance(params, (str, os.PathLike))
            file = "; of a file, `checkpoints.analyze_checkpoint(path)`" if is_file else ""
            raise TypeError(f"`params` {where}: every leaf must be an array of numbers{order}{file}")
        if path in named:
            raise ValueError(f"`params` has two leaves with the path {path!r}")
        named[path] = leaf
    if not named:
        raise ValueError(f"`params` has no arrays, got {params!r}: pass the trained parameters")
    return named


def _is_model(params: Any) -> TypeError:
    return TypeError(
        f"`params` is the module {type(params).__name__} itself: pass what "
        "`params, apply_fn = jaxeff.functional(model)` gives"
    )


def batch_size(
    batch: tuple, outputs: Callable[[], Any] | None = None, *, abstract: bool = False
) -> int | None:
    """Return the leading size of a batch's arrays; None if the batch holds only single numbers.

    Where arrays differ, as nodes and edges of a graph do, it is the first one that an output has as well, and
    None if no output has any: then the arrays do not tell what an example is.

    Args:
        outputs: gives what the model returns, or its shapes. Without it the first array decides.
        abstract: whether a `jax.ShapeDtypeStruct` may replace an array.

    Raises:
        TypeError: a leaf is not an array of numbers.
        ValueError: an array holds no examples, or there are no arrays.
    """
    sizes: list[int] = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if not is_array(leaf, abstract=abstract):
            raise TypeError(
                f"`batch` holds a {type(leaf).__name__} at {jax.tree_util.keystr(keys)}: it must be an "
                "array of numbers, a tree of them, or a tuple of several inputs; encode text first"
            )
        shape = leaf.shape if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.shape(leaf)
        if 0 in shape:
            raise ValueError(f"`batch` is empty: an array of shape {shape} holds no examples")
        if shape:
            sizes.append(shape[0])
    if not jax.tree.leaves(batch):
        raise ValueError("`batch` holds no arrays: pass the model's input")
    if len(set(sizes)) < 2 or outputs is None:
        return sizes[0] if sizes else None
    returned = {leaf.shape[0] for leaf in jax.tree.leaves(outputs()) if jnp.ndim(leaf)}
    return next((size for size in sizes if size in returned), None)


def is_array(leaf: Any, *, abstract: bool = False) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biufc" or jnp.issubdtype(leaf.dtype, jnp.floating)
    return isinstance(leaf, (jax.Array, np.number, np.bool_, bool, int, float))


def leaves_by_path(tree: Any) -> list[tuple[Path, Any]]:
    """Return every leaf with its path, in the order of `jax.tree.leaves`.

    A path is the keys of a leaf, joined by '/'. A box (`nn.Partitioned`, `nnx.Param`) adds no key of its own;
    a field called `value` does.

    >>> leaves_by_path({"kernel": nnx.Param(1.0), "attn": {"value": 2.0}})
    [('attn/value', 2.0), ('kernel', 1.0)]
    """
    return [("/".join(map(key_name, keys)), leaf) for keys, leaf in _unboxed(tree)]


def is_a(value: Any, package: str, *names: str) -> bool:
    """Return whether a class of these names in a package, which is not imported, is among the value's."""
    return any(
        base.__name__ in names and base.__module__.partition(".")[0] == package
        for base in type(value).__mro__
    )


def own_arrays(tree: Any) -> Any:
    """Copy each array of a tree, so that a step may donate the tree: no array occurs twice or elsewhere.

    >>> array = jnp.ones(2)
    >>> one, other = own_arrays((array, array))
    >>> len({leaf.unsafe_buffer_pointer() for leaf in (array, one, other)})
    3
    """
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, (jax.Array, np.ndarray)) else leaf, tree)


def key_name(key: Any) -> str:
    """Return one key of a pytree path as a part of a name."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _unboxed(node: Any) -> Iterator[tuple[tuple, Any]]:
    """Return leaves with their keys, without the keys of boxes."""

    def is_inner_box(child: Any) -> bool:
        return child is not node and isinstance(child, _BOXES)

    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_inner_box)[0]
    # A box of several parts keeps their names, to tell them apart.
    one_part = isinstance(node, _BOXES) and len({keys[:1] for keys, _ in children}) == 1
    for keys, child in children:
        outer = keys[1:] if one_part else keys
        inner = _unboxed(child) if is_inner_box(child) else [((), child)]
        yield from ((outer + below, leaf) for below, leaf in inner)
