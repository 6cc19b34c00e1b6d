"""Functions that are hashable by content: equal exactly when they compute the same.

`jax.jit` therefore traces and compiles each once: a bound `Module.apply` of equal Linen modules, NNX models of
equal structure, and any functions with the same traced program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import traceback
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jaxeff.model.params import Path, key_name


class Function(Protocol):
    """`function(params, inputs) -> (outputs, captured)`; equal functions compute the same.

    `captured` holds the module outputs that Flax names, by module path.
    """

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]: ...
    def __hash__(self) -> int: ...
    def without_capture(self) -> Function: ...


# Errors that user code raises when its arguments do not match.
MISFITS = (TypeError, ValueError, KeyError, IndexError, AttributeError, flax.errors.FlaxError)


def content(value: Any) -> Hashable:
    """Return something hashable that is equal for equal values: the value itself, or its parts.

    Lists, dicts and most dataclasses cannot be hashed, and neither can a module with a field of that type.

    Raises:
        TypeError: part of the value has another type that cannot be hashed.

    >>> hash(content(nn.Sequential([nn.Dense(4)]))) == hash(content(nn.Sequential([nn.Dense(4)])))
    True
    """
    with contextlib.suppress(TypeError):
        _ = hash(value)
        return value
    if isinstance(value, (list, tuple)):
        return type(value), *map(content, value)
    if isinstance(value, Mapping):
        return type(value), *((key, content(part)) for key, part in value.items())
    if isinstance(value, nn.Module):
        names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        return type(value), *((name, content(getattr(value, name))) for name in names)
    if dataclasses.is_dataclass(value):
        return type(value), *((name, content(part)) for name, part in vars(value).items())
    raise TypeError(f"a {type(value).__name__} cannot be hashed")


class _Identified:
    """Equal to another of its type with an equal identity."""

    identity: Any

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


@dataclasses.dataclass(frozen=True, eq=False)
class LinenFunction(_Identified):
    """`module.apply`: equal for equal modules and equal static arguments.

    Its inputs are (state, batch, keyword arrays). Updates of mutable collections are dropped.
    """

    module: nn.Module
    statics: tuple[tuple[str, Any], ...]
    identity: Any
    capture: bool = True

    def without_capture(self) -> Function:
        return dataclasses.replace(self, capture=False, identity=(self.identity, "without capture"))

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]:
        state, batch, arrays = inputs
        keywords = {**dict(self.statics), **arrays}
        variables = {**state, "params": params}
        mutable = _mutable(keywords.pop("mutable", False))
        if self.capture and isinstance(mutable, list):
            capture = {"capture_intermediates": True, "mutable": [*mutable, "intermediates"]}
            # Capture can fail where plain apply works (in nn.cond, for example); then do without it.
            try:
                outputs, updates = self.module.apply(variables, *batch, **keywords, **capture)
            except (*MISFITS, jax.errors.UnexpectedTracerError):
                pass
            else:
                return outputs, _captured(updates.get("intermediates") or {})
        plain = functools.partial(self.module.apply, **keywords, mutable=mutable or False)
        outputs = named_misfit(plain, variables, batch)
        return outputs[0] if mutable else outputs, {}


def merged(structure: Any, params: Any, state: Any) -> nnx.Module:
    """Merge an NNX model from its parts; `params` may be a plain dict, as from `nnx.to_pure_dict`."""
    # Some versions of Flax cannot read a State of a State.
    params = params if isinstance(params, nnx.State) else nnx.State(params)
    return nnx.merge(structure, params, state)


@dataclasses.dataclass(frozen=True, eq=False)
class NNXFunction(_Identified):
    """An NNX model split into structure and state: equal for equal structures.

    Its inputs are (state, batch, keyword arrays). Changes of the state are dropped.
    """

    structure: Any
    statics: tuple[tuple[str, Any], ...]
    identity: Any

    def without_capture(self) -> Function:
        return self

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]:
        state, batch, arrays = inputs

        def apply(params: Any, *batch: Any) -> Any:
            model = merged(self.structure, params, state)
            return model(*batch, **dict(self.statics), **arrays)

        return named_misfit(apply, params, batch), {}


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction(_Identified):
    """A function as its traced program, with its arrays as inputs and its text as its identity.

    Its inputs are (inputs of the function, arrays that it closed over).
    """

    closed: ClosedJaxpr
    outputs: Any
    identity: tuple[Any, ...]

    def without_capture(self) -> Function:
        return self

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]:
        arguments, constants = inputs
        closed = ClosedJaxpr(self.closed.jaxpr, constants)
        outputs = jaxpr_as_fun(closed)(*jax.tree.leaves((params, arguments)))
        return jax.tree.unflatten(self.outputs, outputs), {}


def traced(function: Callable, params: Any, inputs: Any) -> tuple[TracedFunction, list[Any]]:
    """Trace `function(params, inputs)`; return its program, and the arrays that it closed over."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    text = str(closed.jaxpr)
    # An address in the text (a Python callback) may be reused by another object, so it is only equal to itself.
    unique = object() if " at 0x" in text else None
    # Arrays that inner calls closed over are neither in the text nor among the inputs.
    nested = tuple(_Same(const) for const in _nested_constants(closed.jaxpr))
    structure = jax.tree.structure((params, inputs)), jax.tree.structure(shapes)
    identity = (text, nested, structure, unique, tuple(jnp.shape(const) for const in closed.consts))
    program = ClosedJaxpr(closed.jaxpr, closed.consts)
    return TracedFunction(program, structure[1], identity), list(closed.consts)


class _Same:
    """Equal only to a wrapper of the same object; keeps the object, so that its id is not reused."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _nested_constants(jaxpr: Jaxpr) -> list[Any]:
    found: list[Any] = []
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, ClosedJaxpr):
                    found.extend(inner.consts)
                    found.extend(_nested_constants(inner.jaxpr))
                elif isinstance(inner, Jaxpr):
                    found.extend(_nested_constants(inner))
    return found


def named_misfit(apply: Callable, variables: Any, batch: tuple) -> Any:
    """Call the user's function, and explain its errors in terms of our arguments."""
    try:
        outputs = apply(variables, *batch)
    except MISFITS as error:
        shapes = ", ".join(str(jax.tree.map(jnp.shape, item)) for item in batch)
        near = near_keyword(str(error)) if isinstance(error, TypeError) else ""
        raise ValueError(
            f"`apply_fn` failed on these `params` and a `batch` of shape {shapes}. It raised "
            f"{type(error).__name__}: {first_line(error)}.{near} `batch` is the model's input as `apply_fn` "
            "takes it (a tuple is several positional inputs); a function that wants a variables dict gets "
            "all of it as `params`, batch_stats and other collections included; keyword arguments and `rngs` "
            "are passed on."
        ) from error
    _check_outputs(outputs)
    return outputs


def _check_outputs(outputs: Any) -> None:
    leaves = jax.tree.leaves(outputs)
    if not leaves:
        raise ValueError(f"`apply_fn` returned {outputs!r}, which holds no arrays: does it lack a `return`?")
    for leaf in leaves:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(
                f"`apply_fn` returned a {type(leaf).__name__} among its outputs: let it return arrays alone"
            )


def near_keyword(message: str) -> str:
    """Return a question if the message quotes a keyword that is nearly an argument of the user's call, else ''.

    The user's call is the outermost one into jaxeff. Verbs pass keywords that they do not know on as `apply_kwargs`.
    """
    verb, near = _near_arguments()
    quoted = [argument for name, argument in near.items() if repr(name) in message]
    return f" Did you mean `{quoted[0]}`, an argument of `{verb}`?" if quoted else ""


def check_keywords(function: Callable) -> None:
    """Refuse a keyword of the user's call that nearly is an argument of it, and that a `**kwargs` would swallow.

    Args:
        function: the model's own, which takes the keywords. One that it names is meant for it.

    Raises:
        TypeError: with the argument that was meant, and how to pass the keyword on.
    """
    verb, near = _near_arguments()
    if not near:
        return
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function of C, which says nothing of its parameters
        return
    any_keyword = [name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD]
    unnamed = [name for name in near if name not in parameters and name not in _WORDS]
    if any_keyword and unnamed:
        name = unnamed[0]
        raise TypeError(
            f"`{verb}` takes `{near[name]}`, and {name!r} would go unnoticed into the `**{any_keyword[0]}` of the "
            f"model. If that is meant, pass `functools.partial(apply_fn, {name}=...)` as `apply_fn`; for a model, of "
            "`params, apply_fn = jaxeff.functional(model)`"
        )


# Keywords of models that are words of their own, though close to an argument of some verb.
_WORDS = frozenset({"head", "mask", "range", "rng", "score", "shape", "target"})


def _near_arguments() -> tuple[str, dict[str, str]]:
    """Return the user's call, and the keywords that it passes on to the model, each with the argument it is nearly."""
    own = [
        frame
        for frame, _ in traceback.walk_stack(inspect.currentframe())
        if str(frame.f_globals.get("__name__")).startswith("jaxeff.")
    ]
    code, passed_on = own[-1].f_code, own[-1].f_locals.get("apply_kwargs", ())
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    near = {name: difflib.get_close_matches(name, arguments, 1, cutoff=0.75) for name in passed_on}
    return code.co_name, {name: matches[0] for name, matches in near.items() if matches}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "(no message)"


def bound_module(apply_fn: Callable) -> tuple[nn.Module | None, dict[str, Any]]:
    """Return the Linen module behind `model.apply`, a jit of it, or a partial with only keywords."""
    if isinstance(apply_fn, functools.partial) and not apply_fn.args:
        module, keywords = bound_module(apply_fn.func)
        return module, {**keywords, **apply_fn.keywords}
    if isinstance(apply_fn, type(jax.jit(key_name))):
        jitted: Any = apply_fn
        return bound_module(jitted.__wrapped__)
    module = getattr(apply_fn, "__self__", None)
    if isinstance(module, nn.Module) and getattr(apply_fn, "__func__", None) is nn.Module.apply:
        return module, {}
    return None, {}


def _captured(intermediates: Mapping[str, Any]) -> dict[Path, jax.Array]:
    """Return module outputs by module path; repeated calls of a shared module are numbered from the second on."""
    captured: dict[Path, jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        names = [key_name(key) for key in keys]
        if "__call__" not in names or not _alive(leaf):
            continue
        at = names.index("__call__")
        path = "/".join(names[:at])
        calls = [number for number in names[at + 1 :] if number != "0"]
        captured["#".join([path, *calls])] = leaf
    return captured


def _alive(leaf: Any) -> bool:
    """Return False for a tracer that leaked out of a transformation inside the module (a raw vmap)."""
    if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 1:
        return False
    try:
        _ = jnp.negative(leaf)
    except jax.errors.UnexpectedTracerError:
        return False
    return True


def _mutable(mutable: Any) -> Any:
    """Return the collections to mutate as a list; True or a filter is unchanged, and nothing is captured."""
    if mutable is False:
        return []
    return [mutable] if isinstance(mutable, str) else list(mutable) if isinstance(mutable, tuple) else mutable
