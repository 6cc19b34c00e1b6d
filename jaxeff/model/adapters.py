"""Models of other libraries as pure functions: model -> params, apply_fn; and pruned params back into the model.

A library is imported only where one of its models came, which has imported it already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxeff.model.apply import ModelApply, NNXApply, StatefulApply
from jaxeff.model.functions import bound_module, near_keyword
from jaxeff.model.keras_models import restore_keras, split_keras
from jaxeff.model.named_arrays import is_haliax, restore_haliax, restore_penzai, split_haliax, split_penzai
from jaxeff.model.params import is_a, is_variables, named_leaves
from jaxeff.model.quantized import dequantized, holds_quantized, requantized


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
    | `equinox.Module`, or `(model, state)` | attributes | the model on each example, by `jax.vmap` |
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
    >>> restore(model, jax.tree.map(jnp.zeros_like, params)).kernel[...].sum()
    Array(0., dtype=float32)
    """
    adapter = _adapter(model)
    own, given = (named_leaves(tree) for tree in (adapter.split(model, False)[0], params))
    for path in [*own, *given]:
        if path not in given or path not in own:
            raise ValueError(
                f"`params` {'has no' if path in own else 'has a leaf'} {path!r}, unlike the model"
            )
        if jnp.shape(own[path]) != jnp.shape(given[path]):
            raise ValueError(
                f"{path!r} has shape {jnp.shape(given[path])}, and {jnp.shape(own[path])} in the model: `restore` "
                "keeps shapes. Run smaller params with the function from `prune.compact`, or build a smaller model"
            )
    return adapter.restore(model, params)


def resolve(
    params: Any, apply_fn: Any, batch: Any, rngs: Any = None, apply_kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, Any, Any]:
    """Return `(params, apply_fn, batch)` of `(model, batch)`; anything else is unchanged.

    Raises:
        TypeError: `rngs` or `apply_kwargs` come without an `apply_fn` that could take them.
    """
    params, apply_fn, batch = _resolved(params, apply_fn, batch)
    given = [*(apply_kwargs or {}), *(["rngs"] if rngs is not None else [])]
    if apply_fn is None and given:
        message = f"there is no `apply_fn` that could take the keyword {given[0]!r}"
        raise TypeError(f"{message}.{near_keyword(message)}")
    return params, apply_fn, batch


def _resolved(params: Any, apply_fn: Any, batch: Any) -> tuple[Any, Any, Any]:
    if apply_fn is not None and batch is not None:
        if not callable(apply_fn) and _found(params) is not None:
            raise TypeError(
                f"a {type(params).__name__} came with two more arguments: pass (model, batch), with several inputs in "
                "one tuple, (model, (first, second)); labels are not an input, but `targets`"
            )
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


# Flax


def _split_nnx(model: nnx.Module, training: bool) -> tuple[Any, StatefulApply]:
    # The mode is an attribute of the modules, so it is set on a copy, which shares the arrays.
    copy = nnx.merge(*nnx.split(model))
    copy.train() if training else copy.eval()
    structure, *parts = nnx.split(copy, nnx.Param, ...)
    # Variables of its own, because an update of the model writes into those that it has.
    params, state = jax.tree.map(lambda leaf: leaf, parts)
    apply_fn = NNXApply(structure, state, type(model).__call__)
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
    return is_a(value, "equinox", "Module") or (
        isinstance(value, tuple)
        and len(value) == 2
        and is_a(value[0], "equinox", "Module")
        and is_a(value[1], "equinox", "State")
    )


def _split_equinox(model: Any, training: bool) -> tuple[Any, StatefulApply]:
    import equinox as eqx  # pyright: ignore[reportMissingImports]

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

    return params, ModelApply(call, type(model).__call__, state)


def _restore_equinox(model: Any, params: Any) -> Any:
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    module, *state = model if isinstance(model, tuple) else (model,)
    restored = eqx.combine(params, eqx.partition(module, eqx.is_inexact_array)[1])
    return (restored, *state) if state else restored


_ADAPTERS = (
    Adapter(lambda model: isinstance(model, nnx.Module), _split_nnx, _restore_nnx),
    Adapter(lambda model: is_a(model, "keras", "Layer"), split_keras, restore_keras),
    Adapter(is_haliax, split_haliax, restore_haliax),
    Adapter(_is_equinox, _split_equinox, _restore_equinox),
    Adapter(lambda model: is_a(model, "penzai", "Layer"), split_penzai, restore_penzai),
    Adapter(_is_train_state, _split_train_state, _restore_train_state),
    Adapter(_is_quantized_pair, lambda pair, _: dequantized(*pair), _restore_pair),
)
