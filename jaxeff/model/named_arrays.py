"""Models of named arrays, Haliax's and Penzai's, as functions of plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.model.apply import ModelApply, StatefulApply
from jaxeff.model.params import is_a, key_name

# Haliax


def _is_named(value: Any) -> bool:
    return is_a(value, "haliax", "NamedArray")


def is_haliax(value: Any) -> bool:
    return is_a(value, "equinox", "Module") and any(map(_is_named, jax.tree.leaves(value, is_leaf=_is_named)))


def split_haliax(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    leaves, structure = _haliax_leaves(eqx.nn.inference_mode(model, value=not training))

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        model = jax.tree.unflatten(structure, [_haliax_leaf(leaf, params.get(path)) for path, leaf in leaves])
        return model(*jax.tree.map(_sized, batch, is_leaf=_is_named), **keywords)

    arrays = {path: leaf.array if _is_named(leaf) else leaf for path, leaf in leaves}
    axes = {path: [axis.name for axis in leaf.axes] for path, leaf in leaves if _is_named(leaf)}
    params = {path: leaf for path, leaf in arrays.items() if eqx.is_inexact_array(leaf)}
    return params, ModelApply(call, type(model).__call__, axes=axes)


def restore_haliax(model: Any, params: Any) -> Any:
    leaves, structure = _haliax_leaves(model)
    return jax.tree.unflatten(structure, [_haliax_leaf(leaf, params.get(path)) for path, leaf in leaves])


def _haliax_leaves(model: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_named)
    return [("/".join(map(key_name, keys)), leaf) for keys, leaf in leaves], structure


def _haliax_leaf(leaf: Any, array: Any) -> Any:
    if array is None:
        return leaf
    return dataclasses.replace(leaf, array=array) if _is_named(leaf) else array


def _sized(value: Any) -> Any:
    """Give the axes of an input the sizes of its array, which may be one example of the batch."""
    if not _is_named(value):
        return value
    import haliax  # pyright: ignore[reportMissingImports]

    return haliax.named(value.array, tuple(axis.name for axis in value.axes))


# Penzai


def split_penzai(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    from penzai import pz  # pyright: ignore[reportMissingImports]

    if not training:
        model = model.select().at_instances_of(pz.nn.StochasticDropout).apply(lambda layer: layer.disable())
    structure, found = pz.unbind_variables(model, freeze=True)
    kinds = pz.ParameterValue, pz.StateVariableValue
    variables, others = ([one for one in found if isinstance(one, kind)] for kind in kinds)

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        filled = [*_penzai_filled(variables, params), *_penzai_filled(others, state or {})]
        bound = pz.bind_variables(structure, filled, unfreeze_as_copy=True)
        return bound(*jax.tree.map(_penzai_sized, batch, is_leaf=_is_penzai_array), **keywords)

    axes = {path: _penzai_axes(leaf) for path, leaf in _penzai_leaves(found) if _is_penzai_array(leaf)}
    return _penzai_arrays(variables), ModelApply(
        call, type(model).__call__, _penzai_arrays(others) or None, axes
    )


def restore_penzai(model: Any, params: Any) -> Any:
    from penzai import pz  # pyright: ignore[reportMissingImports]

    structure, variables = pz.unbind_params(model, freeze=True)
    return pz.bind_variables(structure, _penzai_filled(variables, params), unfreeze_as_copy=True)


def _is_penzai_array(value: Any) -> bool:
    return is_a(value, "penzai", "NamedArrayBase")


def _penzai_arrays(variables: Any) -> dict[str, Any]:
    return {path: getattr(leaf, "data_array", leaf) for path, leaf in _penzai_leaves(variables)}


def _penzai_leaves(variables: Any) -> list[tuple[str, Any]]:
    """Return the leaves of variables by label; a tree within one variable continues the label."""
    return [
        ("/".join([str(variable.label), *map(key_name, keys)]), leaf)
        for variable in variables
        for keys, leaf in jax.tree_util.tree_flatten_with_path(variable.value, is_leaf=_is_penzai_array)[0]
    ]


def _penzai_axes(array: Any) -> list[str | None]:
    rank = jnp.ndim(array.data_array)
    if is_a(array, "penzai", "NamedArrayView"):
        names = {axis: name for name, axis in array.data_axis_for_name.items()}
    else:  # axes without a name come first
        names = dict(enumerate(array.named_axes, rank - len(array.named_axes)))
    return [str(names[axis]) if axis in names else None for axis in range(rank)]


def _penzai_filled(variables: Any, arrays: Mapping[str, Any]) -> list[Any]:
    filled = []
    for variable in variables:
        leaves, structure = jax.tree_util.tree_flatten_with_path(variable.value, is_leaf=_is_penzai_array)
        new = []
        for keys, leaf in leaves:
            array = arrays["/".join([str(variable.label), *map(key_name, keys)])]
            new.append(dataclasses.replace(leaf, data_array=array) if _is_penzai_array(leaf) else array)
        filled.append(dataclasses.replace(variable, value=jax.tree.unflatten(structure, new)))
    return filled


def _penzai_sized(value: Any) -> Any:
    """Give the axes of an input the sizes of its array, which may be one example of the batch."""
    if not is_a(value, "penzai", "NamedArray"):
        return value
    # Axes without a name come first.
    names = list(value.named_axes)
    sizes = jnp.shape(value.data_array)[jnp.ndim(value.data_array) - len(names) :]
    return dataclasses.replace(value, named_axes=type(value.named_axes)(zip(names, sizes, strict=True)))
