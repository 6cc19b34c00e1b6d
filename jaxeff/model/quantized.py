"""Quantized weights as what they stand for: weight = (q - zero point) x scale, and back where that is exact.

Read are the arrays of Qwix: a `QArray`, in Linen's trees boxed as `WithAux`, in NNX's pure dicts as
`{"array": {"qvalue": ..., "scale": ...}}`. Neither Qwix nor its types are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff.model.apply import StatefulApply, called
from jaxeff.model.functions import bound_module
from jaxeff.model.params import key_name, split_variables


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedApply(StatefulApply):
    """`apply_fn(params, *batch)` of a model with quantized weights, whose params hold the weights in floats.

    Attributes:
        apply_fn: takes the quantized weights.
        quantized: a tree like `params` in which quantized weights are whole.
        collections: whether `apply_fn` takes variables with other collections beside `params`.
        state: `scales` and `zero_points` by the path of their weight; `rest`, the state of `apply_fn`, or the
            other collections.
    """

    apply_fn: Callable[..., Any]
    quantized: Any
    collections: bool
    state: Any

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        filled = _map(lambda path, node, leaf: self._filled(path, node, leaf), self.quantized, params)
        apply_fn, rest = self.apply_fn, self.state["rest"]
        if self.collections:
            filled = {**rest, "params": filled}
        elif isinstance(apply_fn, StatefulApply):
            apply_fn = apply_fn.with_state(rest)
        return apply_fn(filled, *batch, **keywords)

    def model_call(self, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        return called(self.apply_fn, keywords)

    def axis_name(self, path: str, axis: int) -> str | None:
        return self.apply_fn.axis_name(path, axis) if isinstance(self.apply_fn, StatefulApply) else None

    def _filled(self, path: str, node: Any, weight: Any) -> Any:
        if not _is_quantized(node):
            return weight
        scale, zero_point = (self.state[name].get(path) for name in ("scales", "zero_points"))
        qvalue = _steps(weight, scale, zero_point, _parts(node)["qvalue"].dtype)
        return _with_parts(node, {"qvalue": qvalue, "scale": scale, "zero_point": zero_point})


def holds_quantized(tree: Any) -> bool:
    """Return whether a quantized weight is in a tree."""
    return any(map(_is_quantized, jax.tree.leaves(tree, is_leaf=_is_quantized)))


def dequantized(params: Any, apply_fn: Callable[..., Any]) -> tuple[Any, QuantizedApply]:
    """Return params with the weights in floats, and the function of them."""
    quantized, rest = split_variables(params)
    is_linen = bound_module(apply_fn)[0] is not None
    if isinstance(apply_fn, StatefulApply):
        rest = apply_fn.state
    scales: dict[str, Any] = {}
    zero_points: dict[str, Any] = {}

    def weight(path: str, node: Any, _: Any) -> Any:
        if not _is_quantized(node):
            return node
        parts = _parts(node)
        scales[path] = parts["scale"]
        if parts.get("zero_point") is not None:
            zero_points[path] = parts["zero_point"]
        return _weight(parts)

    found = _map(weight, quantized, quantized)
    state = {"scales": scales, "zero_points": zero_points, "rest": rest}
    return found, QuantizedApply(apply_fn, quantized, is_linen or quantized is not params, state)


def requantized(params: Any, weights: Any) -> Any:
    """Return `params` with these weights in place of the quantized ones.

    Raises:
        ValueError: a weight lies between two steps of its scale.
    """
    quantized, rest = split_variables(params)

    def node(path: str, node: Any, weight: Any) -> Any:
        if not _is_quantized(node):
            return weight
        parts = _parts(node)
        qvalue = _steps(weight, parts["scale"], parts.get("zero_point"), parts["qvalue"].dtype)
        if not bool(jnp.array_equal(_weight({**parts, "qvalue": qvalue}), weight)):
            raise ValueError(
                f"{path!r} is quantized, and its new values lie between the steps of its scale: mask weights, which "
                "is exact, or dequantize the model before you change them"
            )
        return _with_parts(node, {**parts, "qvalue": qvalue})

    filled = _map(node, quantized, weights)
    return {**rest, "params": filled} if quantized is not params else filled


def _is_quantized(node: Any) -> bool:
    if isinstance(node, Mapping):
        node = node.get("array") if node.keys() == {"array"} else node
    elif type(node).__name__ == "WithAux":
        node = node.array
    if isinstance(node, Mapping):
        return {"qvalue", "scale"} <= node.keys()
    return type(node).__name__ == "QArray" and hasattr(node, "qvalue") and hasattr(node, "scale")


def _parts(node: Any) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return dict(node.get("array", node))
    array = node.array if type(node).__name__ == "WithAux" else node
    return {name: getattr(array, name) for name in ("qvalue", "scale", "zero_point")}


def _with_parts(node: Any, parts: Mapping[str, Any]) -> Any:
    if isinstance(node, Mapping):
        inner = {name: value for name, value in parts.items() if value is not None}
        return {"array": inner} if "array" in node else inner
    if type(node).__name__ == "WithAux":
        return dataclasses.replace(node, array=_with_parts(node.array, parts))
    return dataclasses.replace(node, **parts)


def _map(function: Callable[[str, Any, Any], Any], quantized: Any, weights: Any) -> Any:
    """`function(path, node, leaf)` on every leaf of `quantized`, whole if it is quantized, and of `weights`."""
    nodes, structure = jax.tree_util.tree_flatten_with_path(quantized, is_leaf=_is_quantized)
    leaves = structure.flatten_up_to(weights)
    paths = ["/".join(map(key_name, keys)) for keys, _ in nodes]
    new = [function(path, node, leaf) for path, (_, node), leaf in zip(paths, nodes, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def _weight(parts: Mapping[str, Any]) -> jax.Array:
    qvalue, scale, zero_point = parts["qvalue"], parts["scale"], parts.get("zero_point")
    steps = qvalue.astype(scale.dtype)
    if zero_point is not None:
        steps = steps - _tiled(zero_point.astype(scale.dtype), qvalue.shape)
    return steps * _tiled(scale, qvalue.shape)


def _steps(weight: Any, scale: Any, zero_point: Any, dtype: Any) -> jax.Array:
    steps = _without_gradient(weight) / _tiled(scale, weight.shape)
    if zero_point is not None:
        steps = steps + _tiled(zero_point.astype(steps.dtype), weight.shape)
    return (jnp.round(steps) if jnp.issubdtype(dtype, jnp.integer) else steps).astype(dtype)


@jax.custom_jvp
def _without_gradient(weight: jax.Array) -> jax.Array:
    """Refuse to be differentiated: rounding would pass a gradient of 0, and every score would be 0."""
    return weight


@_without_gradient.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "quantized weights pass no gradient: choose a criterion without gradients, or dequantize the model first"
    )


def _tiled(array: Any, shape: tuple[int, ...]) -> Any:
    """Repeat each entry over the elements that share it; a size of 1 broadcasts by itself."""
    for axis, (size, full) in enumerate(zip(array.shape, shape, strict=True)):
        if size not in (1, full):
            array = jnp.repeat(array, full // size, axis)
    return array
