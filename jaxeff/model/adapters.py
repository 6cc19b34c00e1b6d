"""Models of other libraries as pure functions: model -> params, apply_fn; and pruned params back into the model.

A library is imported only where one of its models came, which has imported it already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.model.apply import NNXApply, StatefulApply
from jaxeff.model.functions import bound_module
from jaxeff.model.params import is_variables, key_name, named_leaves
from jaxeff.model.quantized import dequantized, holds_quantized, requantized


@dataclasses.dataclass(frozen=True, eq=False)
class ModelApply(StatefulApply):
    """`apply_fn(params, *batch)` of a model.

    Attributes:
        call: `call(params, state, *batch, **keywords)`.
        state: variables that are not parameters, such as running averages; None if there are none.
    """

    call: Callable[..., Any]
    state: Any = None

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        return self.call(params, self.state, *batch, **keywords)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How to read and write the models of one library.

    Attributes:
        matches: whether an object is one of its models.
        split: `split(model, training) -> params, apply_fn`.
        restore: `restore(model, params) -> model`.
    """

    matches: Callable[[Any], bool]
    split: Callable[[Any, bool], tuple[Any, StatefulApply]]
    restore: Callable[[Any, Any], Any]


def functional(model: Any, *, training: bool = False) -> tuple[Any, Callable[..., Any]]:
    """Split a model into its parameters and a pure function of them.

    `jaxeff.analyze(model, batch)` and the other verbs call it themselves. The model is not changed and shares its
    arrays with `params`: copy `params` before a step donates them.

    | model | names of the parameters | `apply_fn(params, *batch)` calls |
    |---|---|---|
    | `flax.nnx.Module` | attributes | the model |
    | `equinox.Module`, or `(model, state)` | attributes | the model on each example, by `jax.vmap` over the leading axis |
    | `keras.Model` on the JAX backend | Keras paths | the model |
    | Penzai layer | labels | the model on named arrays |
    | Haliax or Levanter module | attributes | the model on named arrays |
    | Flax `TrainState` | as in its params | `state.apply_fn` |
    | `(params, apply_fn)` with quantized weights | as in `params` | `apply_fn` |

    Quantized weights (Qwix) are scored as what they stand for, (q - zero point) x scale, and `apply_fn` quantizes
    them again. They pass no gradient.

    Args:
        model: of one of these libraries. Linen modules have no parameters of their own: pass
            `(variables, model.apply)` to `jaxeff.analyze`.
        training: run dropout and batch statistics as in training. By default the model runs as it serves.

    Returns:
        `params`, a tree of arrays, and `apply_fn(params, *batch, **keywords)`. Variables that are not parameters,
        such as running averages, are in `apply_fn.state`; what the model would write to them is dropped.

    Raises:
        TypeError: the model is of none of these libraries.
        ValueError: a Keras model is not built, or Keras runs on another backend.

    >>> params, apply_fn = functional(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> apply_fn(params, jnp.ones((2, 3))).shape
    (2, 4)
    """
    return _adapter(model).split(model, training)


def restore(model: Any, params: Any) -> Any:
    """Put pruned parameters of the same shapes back into a model.

    Args:
        model: as `jaxeff.functional` takes it.
        params: as `jaxeff.functional` gives it, with other values.

    Returns:
        The model with these parameters. NNX and Keras models are updated in place; of the others, which are
        immutable, this is a new one.

    Raises:
        TypeError: the model is of none of the libraries that `jaxeff.functional` reads.
        ValueError: a name or shape differs from the model's, or a quantized weight cannot hold its new values
            exactly. Zeros, and values that the weight had, it always can.

    >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> params, _ = functional(model)
    >>> restore(model, jax.tree.map(jnp.zeros_like, params)).kernel.value.sum()
    Array(0., dtype=float32)
    """
    adapter = _adapter(model)
    own, given = (named_leaves(tree) for tree in (adapter.split(model, False)[0], params))
    for path in [*own, *given]:
        if path not in given or path not in own:
            raise ValueError(f"`params` {'has no' if path in own else 'has a leaf'} {path!r}, unlike the model")
        if jnp.shape(own[path]) != jnp.shape(given[path]):
            raise ValueError(
                f"{path!r} has shape {jnp.shape(given[path])}, and {jnp.shape(own[path])} in the model: `restore` "
                "keeps shapes. Run smaller params with the function from `prune.compact`, or build a smaller model"
            )
    return adapter.restore(model, params)


def resolve(params: Any, apply_fn: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Return `(params, apply_fn, batch)` of `(model, batch)`; anything else is unchanged."""
    if apply_fn is not None and batch is not None:
        if _is_quantized_pair((params, apply_fn)):
            params, apply_fn = functional((params, apply_fn))
        return params, apply_fn, batch
    if (adapter := _found(params)) is not None and not (callable(apply_fn) and batch is None):
        params, function = adapter.split(params, False)
        batch = apply_fn if batch is None else batch
        return params, None if batch is None else function, batch
    if isinstance(params, nn.Module) or (apply_fn is not None and not callable(apply_fn)):
        raise _unknown(params)
    return params, apply_fn, batch


def resolve_both(params: Any, apply_fn: Any, batch: Any) -> tuple[Any, Callable[..., Any], Any]:
    """Return `(params, apply_fn, batch)` as `resolve` does, for verbs that need all three."""
    params, apply_fn, batch = resolve(params, apply_fn, batch)
    if apply_fn is None or batch is None:
        missing = "batch" if batch is None else "apply_fn"
        raise TypeError(f"`{missing}` is missing: pass (model, batch) or (params, apply_fn, batch)")
    return params, apply_fn, batch


def _found(model: Any) -> Adapter | None:
    return next((adapter for adapter in _ADAPTERS if adapter.matches(model)), None)


def _adapter(model: Any) -> Adapter:
    if (adapter := _found(model)) is None:
        raise _unknown(model)
    return adapter


def _unknown(model: Any) -> TypeError:
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if isinstance(model, nn.Module):
        return TypeError(
            f"{kind} is a Linen module, which holds no parameters: pass its variables and `model.apply`, "
            "(variables, model.apply, batch)"
        )
    return TypeError(
        f"{kind} is not a model that jaxeff knows. Pass (model, batch) with an nnx.Module, equinox.Module, keras.Model "
        "on the JAX backend, Penzai layer, Haliax or Levanter module, or Flax TrainState; or (params, apply_fn, batch) "
        "with any tree of arrays and any function f(params, *batch), such as a Linen module's `apply`"
    )


def _is_a(value: Any, package: str, *names: str) -> bool:
    """Return whether a class of these names in a package, which is not imported, is among the value's."""
    return any(
        base.__name__ in names and base.__module__.partition(".")[0] == package for base in type(value).__mro__
    )


# Flax


def _split_nnx(model: nnx.Module, training: bool) -> tuple[Any, StatefulApply]:
    # The mode is an attribute of the modules, so it is set on a copy, which shares the arrays.
    copy = nnx.merge(*nnx.split(model))
    copy.train() if training else copy.eval()
    structure, *parts = nnx.split(copy, nnx.Param, ...)
    # Variables of its own, because an update of the model writes into those that it has.
    params, state = jax.tree.map(lambda leaf: leaf, parts)
    apply_fn = NNXApply(structure, state)
    pure = nnx.to_pure_dict(params)
    return dequantized(pure, apply_fn) if holds_quantized(pure) else (params, apply_fn)


def _restore_nnx(model: nnx.Module, params: Any) -> nnx.Module:
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if holds_quantized(pure):
        params = requantized(pure, params)
    nnx.update(model, params if isinstance(params, nnx.State) else nnx.State(params))
    return model


def _is_train_state(value: Any) -> bool:
    return hasattr(value, "apply_fn") and hasattr(value, "params") and not isinstance(value, StatefulApply)


def _split_train_state(state: Any, training: bool) -> tuple[Any, Any]:
    pair = _variables(state), state.apply_fn
    return dequantized(*pair) if _is_quantized_pair(pair) else pair


def _restore_train_state(state: Any, params: Any) -> Any:
    variables = _variables(state)
    if holds_quantized(variables):
        params = requantized(variables, params)
    if variables is state.params:
        return state.replace(params=params)
    averages = {name: params[name] for name in ("batch_stats",) if name in params}
    return state.replace(params=params["params"], **averages)


def _variables(state: Any) -> Any:
    """Return what the state's `apply_fn` takes: a Linen `apply` takes variables."""
    if bound_module(state.apply_fn)[0] is None or is_variables(state.params):
        return state.params
    averages = getattr(state, "batch_stats", None)
    return {"params": state.params, **({} if averages is None else {"batch_stats": averages})}


# Quantized weights of any function


def _is_quantized_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[1]) and holds_quantized(value[0])


def _restore_pair(pair: tuple[Any, Callable], params: Any) -> tuple[Any, Callable]:
    variables, apply_fn = pair
    return requantized(variables, params), apply_fn


# Equinox


def _is_equinox(value: Any) -> bool:
    return _is_a(value, "equinox", "Module") or (
        isinstance(value, tuple)
        and len(value) == 2
        and _is_a(value[0], "equinox", "Module")
        and _is_a(value[1], "equinox", "State")
    )


def _split_equinox(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    import equinox as eqx

    model, state = model if isinstance(model, tuple) else (model, None)
    params, static = eqx.partition(eqx.nn.inference_mode(model, value=not training), eqx.is_inexact_array)

    def call(params: Any, state: Any, *batch: Any, key: Any = None, **keywords: Any) -> Any:
        model = eqx.combine(params, static)
        keys = None if key is None else jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])

        def one(key: Any, *example: Any) -> Any:
            own = keywords if key is None else {**keywords, "key": key}
            if state is None:
                return model(*example, **own)
            return model(*example, state, **own)[0]

        # BatchNorm's documentation names the axis so.
        return jax.vmap(one, axis_name="batch")(keys, *batch)

    return params, ModelApply(call, state)


def _restore_equinox(model: Any, params: Any) -> Any:
    import equinox as eqx

    module, *state = model if isinstance(model, tuple) else (model,)
    restored = eqx.combine(params, eqx.partition(module, eqx.is_inexact_array)[1])
    return (restored, *state) if state else restored


# Haliax


def _is_named(value: Any) -> bool:
    return _is_a(value, "haliax", "NamedArray")


def _is_haliax(value: Any) -> bool:
    return _is_a(value, "equinox", "Module") and any(map(_is_named, jax.tree.leaves(value, is_leaf=_is_named)))


def _split_haliax(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    import equinox as eqx

    leaves, structure = _haliax_leaves(eqx.nn.inference_mode(model, value=not training))

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        model = jax.tree.unflatten(structure, [_haliax_leaf(leaf, params.get(path)) for path, leaf in leaves])
        return model(*jax.tree.map(_sized, batch, is_leaf=_is_named), **keywords)

    arrays = {path: leaf.array if _is_named(leaf) else leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in arrays.items() if eqx.is_inexact_array(leaf)}, ModelApply(call)


def _restore_haliax(model: Any, params: Any) -> Any:
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
    import haliax

    return haliax.named(value.array, tuple(axis.name for axis in value.axes))


# Penzai


def _split_penzai(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    from penzai import pz

    if not training:
        model = model.select().at_instances_of(pz.nn.StochasticDropout).apply(lambda layer: layer.disable())
    structure, found = pz.unbind_variables(model, freeze=True)
    kinds = pz.ParameterValue, pz.StateVariableValue
    variables, others = ([one for one in found if isinstance(one, kind)] for kind in kinds)

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        filled = [*_penzai_filled(variables, params), *_penzai_filled(others, state or {})]
        bound = pz.bind_variables(structure, filled, unfreeze_as_copy=True)
        return bound(*jax.tree.map(_penzai_sized, batch, is_leaf=_is_penzai_array), **keywords)

    return _penzai_arrays(variables), ModelApply(call, _penzai_arrays(others) or None)


def _restore_penzai(model: Any, params: Any) -> Any:
    from penzai import pz

    structure, variables = pz.unbind_params(model, freeze=True)
    return pz.bind_variables(structure, _penzai_filled(variables, params), unfreeze_as_copy=True)


def _is_penzai_array(value: Any) -> bool:
    return _is_a(value, "penzai", "NamedArrayBase")


def _penzai_arrays(variables: Any) -> dict[str, Any]:
    """Return the arrays of variables by label; a tree within one variable continues the label."""
    return {
        "/".join([str(variable.label), *map(key_name, keys)]): getattr(leaf, "data_array", leaf)
        for variable in variables
        for keys, leaf in jax.tree_util.tree_flatten_with_path(variable.value, is_leaf=_is_penzai_array)[0]
    }


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
    if not _is_a(value, "penzai", "NamedArray"):
        return value
    # Axes without a name come first.
    names = list(value.named_axes)
    sizes = jnp.shape(value.data_array)[jnp.ndim(value.data_array) - len(names) :]
    return dataclasses.replace(value, named_axes=type(value.named_axes)(zip(names, sizes, strict=True)))


# Keras


def _split_keras(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}: set the environment variable KERAS_BACKEND to 'jax' before "
            "keras is imported"
        )
    if not model.variables:
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

    def call(params: Any, state: Any, *batch: Any, **keywords: Any) -> Any:
        params = {path: leaf["qvalue"] if isinstance(leaf, Mapping) else leaf for path, leaf in params.items()}
        values = {**fixed, **params, **(state or {})}
        lists = [[values[path] for path in paths] for paths in (trainable, other)]
        return model.stateless_call(*lists, *batch, **{"training": training, **keywords})[0]

    quantized = _keras_quantized(model, arrays)
    params, apply_fn = {**params, **quantized}, ModelApply(call, state or None)
    return dequantized(params, apply_fn) if quantized else (params, apply_fn)


def _restore_keras(model: Any, params: Any) -> Any:
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
            raise ValueError(f"the Keras layer {layer.name!r} is quantized to {mode}, and jaxeff reads int8")
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


_ADAPTERS = (
    Adapter(lambda model: isinstance(model, nnx.Module), _split_nnx, _restore_nnx),
    Adapter(lambda model: _is_a(model, "keras", "Layer"), _split_keras, _restore_keras),
    Adapter(_is_haliax, _split_haliax, _restore_haliax),
    Adapter(_is_equinox, _split_equinox, _restore_equinox),
    Adapter(lambda model: _is_a(model, "penzai", "Layer"), _split_penzai, _restore_penzai),
    Adapter(_is_train_state, _split_train_state, _restore_train_state),
    Adapter(_is_quantized_pair, lambda pair, _: dequantized(*pair), _restore_pair),
)
