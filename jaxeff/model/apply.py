"""Models as pure functions: `function(params, inputs)`, with all arrays that it reads.

A `Model` is made from a user's `params`, `apply_fn` and `batch`, or from an NNX model. Arguments that do not match
are reported here. `adapters` makes the two of models of other libraries.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from jaxeff.model.functions import (
    Function,
    LinenFunction,
    NNXFunction,
    bound_module,
    check_keywords,
    content,
    merged,
    named_misfit,
    traced,
)
from jaxeff.model.params import Params, batch_size


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A function `function(params, inputs)`, with all arrays that it reads.

    `paths` names the leaves of `params`. `origins` says whether each leaf of `inputs` is 'constant' (state, and
    arrays that the function closed over, which are the same for every batch), 'batch', or another 'argument'.
    """

    function: Function
    paths: tuple[str, ...]
    params: Any
    inputs: Any
    origins: tuple[str, ...]
    batch_size: int | None

    @property
    def named(self) -> dict[str, Any]:
        """The leaves of `params` by path."""
        return dict(zip(self.paths, jax.tree.leaves(self.params), strict=True))


class StatefulApply(abc.ABC):
    """An `apply_fn(params, *batch)` that holds variables besides the parameters: a dataclass with a `state`."""

    state: Any

    @abc.abstractmethod
    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any: ...

    def with_state(self, state: Any) -> Any:
        """Return the same function with other variables."""
        own: Any = self  # a dataclass, as every subclass is
        return dataclasses.replace(own, state=state)

    @abc.abstractmethod
    def model_call(self, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the model's own function, which takes these keywords."""

    def axis_name(self, path: str, axis: int) -> str | None:
        """Return the name of a leaf's axis in the model's library; None if it has none."""
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelApply(StatefulApply):
    """`apply_fn(params, *batch)` of a model.

    Attributes:
        call: `call(params, state, *batch, **keywords)`.
        called: the function of the model that takes the keywords, without the model's arrays.
        state: variables that are not parameters, such as running averages; None if there are none.
        axes: names of the axes of named arrays, by the path of the leaf; None for an axis without one.
    """

    call: Callable[..., Any]
    called: Callable[..., Any]
    state: Any = dataclasses.field(default=None, repr=False)
    axes: Mapping[str, Sequence[str | None]] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        return self.call(params, self.state, *batch, **keywords)

    def model_call(self, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        return self.called

    def axis_name(self, path: str, axis: int) -> str | None:
        return self.axes[path][axis] if path in self.axes else None


@dataclasses.dataclass(frozen=True, eq=False)
class NNXApply(StatefulApply):
    """`apply_fn(params, *batch)` of an NNX model.

    Attributes:
        structure: graph definition of the model.
        state: all variables that are not parameters: running averages, random streams.
        called: the model's `__call__`.
    """

    structure: Any = dataclasses.field(repr=False)
    state: Any = dataclasses.field(repr=False)
    called: Callable[..., Any] = dataclasses.field(repr=False)

    def model_call(self, keywords: Mapping[str, Any]) -> Callable[..., Any]:
        return self.called

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        # It gets its own variables, because those from outside may not be written inside jit or grad.
        state = jax.tree.map(lambda leaf: leaf, self.state)
        return merged(self.structure, params, state)(*batch, **keywords)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A user's apply function with its arguments: `call(params, inputs)`.

    Attributes:
        function: the same as a `Function`, for a Linen module or an NNX model.
        hashable: whether that function can be hashed by content, without a trace.
        origins: as in `Model`.
    """

    call: Callable[[Any, Any], Any]
    function: Function | None
    hashable: bool
    paths: tuple[str, ...]
    params: Any
    inputs: Any
    origins: tuple[str, ...]
    batch_size: int | None

    def plain(self, params: Any, inputs: Any) -> Any:
        """Return only the outputs."""
        if self.function is not None:
            return self.function.without_capture()(params, inputs)[0]
        return self.call(params, inputs)

    def shapes(self) -> Any:
        """Return the shapes of the outputs."""
        if self.function is not None and self.hashable:
            return output_shapes(self.function, self.params, self.inputs)
        return jax.eval_shape(self.plain, self.params, self.inputs)


def output_shapes(function: Function, params: Any, inputs: Any) -> Any:
    """Return the shapes of what a function returns; equal functions are traced once."""
    return _outputs.eval_shape(function, params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(function: Function, params: Any, inputs: Any) -> Any:
    return function.without_capture()(params, inputs)[0]


def from_apply(params: Any, apply_fn: Callable, batch: Any, rngs: Any, keywords: Mapping[str, Any]) -> Model:
    """Bind a user's apply function to its arguments, checking each."""
    bound = bind(params, apply_fn, batch, rngs, keywords)
    if bound.function is not None and bound.hashable:
        return Model(bound.function, bound.paths, bound.params, bound.inputs, bound.origins, bound.batch_size)
    function, constants = traced(bound.plain, bound.params, bound.inputs)
    origins = (*bound.origins, *("constant",) * len(constants))
    return Model(function, bound.paths, bound.params, (bound.inputs, constants), origins, bound.batch_size)


def bind(
    params: Any,
    apply_fn: Callable,
    batch: Any,
    rngs: Any,
    keywords: Mapping[str, Any],
    *,
    abstract: bool = False,
) -> Bound:
    """Bind a user's apply function to its arguments without tracing.

    Args:
        params: from the user, or `Params`.
        abstract: whether shapes (`jax.ShapeDtypeStruct`) may replace arrays.
    """
    check_apply(apply_fn)
    check_keywords(called(apply_fn, keywords))
    batch = batch if isinstance(batch, tuple) else (batch,)
    params = Params.of(params, abstract=abstract)
    state: Any = params.state
    module, own = bound_module(apply_fn)
    keywords = {**own, **keywords, **({} if rngs is None else {"rngs": rngs})}
    if isinstance(keywords.get("mutable"), list):
        keywords["mutable"] = tuple(keywords["mutable"])
    arrays = {name: value for name, value in keywords.items() if has_array(value)}
    statics = tuple(sorted((name, value) for name, value in keywords.items() if name not in arrays))
    function: Function | None = None
    identity = None
    if module is not None:
        identity = _content((module, statics))
        function = LinenFunction(module, statics, identity)
    elif isinstance(apply_fn, NNXApply):
        identity = _content((apply_fn.structure, statics))
        function, state = NNXFunction(apply_fn.structure, statics, identity), apply_fn.state
    elif isinstance(apply_fn, StatefulApply) and jax.tree.leaves(apply_fn.state):
        state = apply_fn.state
    inputs = (state, batch, arrays)
    origins = tuple(
        origin
        for origin, part in (("constant", state), ("batch", batch), ("argument", arrays))
        for _ in jax.tree.leaves(part)
    )
    call = functools.partial(_call, apply_fn, params.is_variables, statics)
    bound = Bound(call, function, identity is not None, params.paths, params.tree, inputs, origins, None)
    examples = batch_size(batch, bound.shapes, abstract=abstract)
    return dataclasses.replace(bound, batch_size=examples)


def check_apply(apply_fn: Any) -> None:
    if isinstance(apply_fn, nn.Module):
        raise TypeError(
            f"`apply_fn` is the module {type(apply_fn).__name__} itself: pass its `apply` (`model.apply`)"
        )
    if isinstance(apply_fn, nnx.Module):
        raise TypeError(
            f"`apply_fn` is the NNX module {type(apply_fn).__name__} itself: pass the model alone, (model, batch), or "
            "what `params, apply_fn = jaxeff.functional(model)` gives"
        )
    if not callable(apply_fn):
        raise TypeError(
            f"`apply_fn` must be callable, got {type(apply_fn).__name__}: pass `model.apply`, "
            "`state.apply_fn` or a function f(params, *batch)"
        )


def called(apply_fn: Callable, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the user's own function behind an `apply_fn`, which takes these keywords."""
    module, bound = bound_module(apply_fn)
    if module is None:
        return apply_fn.model_call(keywords) if isinstance(apply_fn, StatefulApply) else apply_fn
    method = {**bound, **keywords}.get("method") or "__call__"
    return getattr(module, method, apply_fn) if isinstance(method, str) else method


def _call(apply_fn: Callable, whole: bool, statics: tuple, params: Any, inputs: Any) -> Any:
    state, batch, arrays = inputs
    if isinstance(apply_fn, StatefulApply) and jax.tree.leaves(apply_fn.state):
        apply_fn, whole = apply_fn.with_state(state), False
    variables = {**state, "params": params} if whole else params
    return named_misfit(functools.partial(apply_fn, **dict(statics), **arrays), variables, batch)


def has_array(value: Any) -> bool:
    kinds = jax.Array, np.ndarray, jax.ShapeDtypeStruct
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))


def _content(value: Any) -> Hashable:
    """Return hashable content, or None for content that cannot be hashed."""
    try:
        return content(value)
    except TypeError:
        return None
