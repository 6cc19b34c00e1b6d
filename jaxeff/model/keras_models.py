"""Keras models as functions of the values of their variables, by path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxeff.model.apply import ModelApply, StatefulApply
from jaxeff.model.quantized import dequantized, requantized


def keras_on_jax() -> Any:
    """Return the module `keras`.

    Raises:
        ImportError: Keras, or the backend that it is set to, is not installed.
        ValueError: it runs on another backend.
    """
    remedy = "set the environment variable KERAS_BACKEND to 'jax' before keras is imported"
    try:
        keras = importlib.import_module("keras")
    except ImportError as error:
        if error.name == "keras":
            raise ImportError("this needs Keras: pip install 'jaxeff[keras]'", name="keras") from error
        if (error.name or "").partition(".")[0] not in ("tensorflow", "torch", "openvino"):
            raise
        raise ImportError(f"Keras cannot import its backend ({error}): {remedy}", name=error.name) from error
    if keras.backend.backend() != "jax":
        raise ValueError(f"Keras runs on {keras.backend.backend()}: {remedy}")
    return keras


def split_keras(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    _ = keras_on_jax()
    if not model.built:
        raise ValueError(f"the Keras model {model.name!r} is not built: call it on a batch first")
    variables = _keras_variables(model)
    arrays = {path: variable.value for path, variable in variables.items()}
    names = {id(variable): path for path, variable in variables.items()}
    trainable, other = (
        [names[id(variable)] for variable in found]
        for found in (model.trainable_variables, model.non_trainable_variables)
    )
    params = {path: arrays[path] for path, variable in variables.items() if _is_keras_weight(variable)}
    floating = {path for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    state = {path: array for path, array in arrays.items() if path in floating - params.keys()}
    # States of random streams have sizes that nothing in the program follows.
    fixed = {path: array for path, array in arrays.items() if path not in {**params, **state}}

    # As Keras's own `fit` passes it: a `call` without the argument gets none.
    mode = {"training": training} if "training" in inspect.signature(model.call).parameters else {}

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        params = {
            path: leaf["qvalue"] if isinstance(leaf, Mapping) else leaf for path, leaf in params.items()
        }
        values = {**fixed, **params, **(state or {})}
        lists = [[values[path] for path in paths] for paths in (trainable, other)]
        return model.stateless_call(*lists, *batch, **{**mode, **keywords})[0]

    quantized = _keras_quantized(model, arrays)
    params, apply_fn = {**params, **quantized}, ModelApply(call, type(model).call, state or None)
    return dequantized(params, apply_fn) if quantized else (params, apply_fn)


def restore_keras(model: Any, params: Any) -> Any:
    variables = _keras_variables(model)
    arrays = {path: variable.value for path, variable in variables.items()}
    written = requantized({**params, **_keras_quantized(model, arrays)}, params)
    for path, leaf in written.items():
        variables[path].assign(leaf["qvalue"] if isinstance(leaf, Mapping) else leaf)
    return model


def _keras_quantized(model: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the int8 weights by path, each with its scale: weight = q x scale, which Keras keeps as 1 / scale."""
    for layer in _keras_layers(model):
        mode = getattr(layer, "quantization_mode", None)
        if mode not in (None, "int8"):
            raise ValueError(
                f"the Keras layer {layer.name!r} is quantized to {mode}, and jaxeff reads int8: analyze the model "
                "before it is quantized, or quantize it to 'int8'"
            )
    found = {}
    for path, array in arrays.items():
        if (scale := arrays.get(f"{path}_scale")) is None or array.dtype != jnp.int8:
            continue
        axis = 0 if path.rpartition("/")[2] == "embeddings" else array.ndim - 1
        if scale.shape != array.shape[axis : axis + 1]:
            raise ValueError(
                f"{path!r} is quantized with a scale of shape {scale.shape}, and jaxeff reads one scale for each unit"
            )
        shape = [1] * array.ndim
        shape[axis] = scale.size
        found[path] = {"qvalue": array, "scale": 1 / jnp.reshape(scale, shape)}
    return found


def _keras_layers(model: Any) -> Iterator[Any]:
    yield model
    for layer in getattr(model, "layers", ()):
        yield from _keras_layers(layer)


def _keras_variables(model: Any) -> dict[str, Any]:
    """Return the variables by path; those that share one are numbered from the second on."""
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for variable in [*model.trainable_variables, *model.non_trainable_variables]:
        counts[variable.path] = number = counts.get(variable.path, 0) + 1
        found[variable.path if number == 1 else f"{variable.path}#{number}"] = variable
    return found


def _is_keras_weight(variable: Any) -> bool:
    """Return whether a variable is trained, or is a frozen matrix; running averages are vectors."""
    is_floating = jnp.issubdtype(variable.value.dtype, jnp.floating)
    return variable.trainable or bool(is_floating and len(variable.shape) > 1)
