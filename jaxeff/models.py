"""Models as pure functions: whatever a user trains -> `function(params, inputs)`, hashable by content.

In: `params`, `apply_fn` and `batch` as the user has them. Out: a `Model`: the parameter leaves under
their paths, everything else that the function reads, and a function that is equal to another
exactly when it computes the same, so that `jax.jit` traces and compiles it once: a bound
`Module.apply` of an equal module, or any function whose traced program is the same.
Imports `graph.program` alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

Path = str


class Function(Protocol):
    """`function(params, inputs) -> (outputs, captured)`; equal functions compute the same."""

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]: ...
    def __hash__(self) -> int: ...
    def without_capture(self) -> Function: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A function and all that it reads: `function(params, inputs)`.

    `origins` says of each leaf of `inputs` whether it is 'constant' (state, and arrays that the
    function closed over: the same for every batch), 'batch', or another 'argument'.
    """

    function: Function
    params: Any
    inputs: Any
    origins: tuple[str, ...]
    batch_size: int | None


# What user code raises when its arguments do not fit each other.
_MISFITS = (TypeError, ValueError, KeyError, IndexError, AttributeError, flax.errors.FlaxError)


def from_apply(params: Any, apply_fn: Callable, batch: Any, rngs: Any, keywords: Mapping[str, Any]) -> Model:
    """Bind a user's apply function to its arguments, each checked and named when it does not fit."""
    if isinstance(apply_fn, nn.Module):
        raise TypeError(
            f"`apply_fn` is the module {type(apply_fn).__name__} itself: pass its `apply` (`model.apply`)"
        )
    if not callable(apply_fn):
        raise TypeError(
            f"`apply_fn` must be callable, got {type(apply_fn).__name__}: pass `model.apply`, "
            "`state.apply_fn` or a function f(params, *batch)"
        )
    batch = batch if isinstance(batch, tuple) else (batch,)
    batch_size = _check_batch(batch)
    core, state = split_variables(params)
    keywords = {**keywords, **({} if rngs is None else {"rngs": rngs})}
    module, bound = _bound_module(apply_fn)
    keywords = {**bound, **keywords}
    if isinstance(keywords.get("mutable"), list):
        keywords["mutable"] = tuple(keywords["mutable"])
    arrays = {name: value for name, value in keywords.items() if _has_array(value)}
    statics = tuple(sorted((name, value) for name, value in keywords.items() if name not in arrays))
    inputs = (state, batch, arrays)
    origins = tuple(
        origin
        for origin, part in (("constant", state), ("batch", batch), ("argument", arrays))
        for _ in jax.tree.leaves(part)
    )
    if module is not None and _hashable((module, statics)):
        return Model(_LinenFunction(module, statics), core, inputs, origins, batch_size)
    function = functools.partial(_call, apply_fn, isinstance(params, Mapping) and "params" in params, statics)
    traced, constants = _trace(function, core, inputs)
    origins += ("constant",) * len(constants)
    return Model(traced, core, (inputs, constants), origins, batch_size)


def split_variables(params: Any) -> tuple[Any, dict[str, Any]]:
    """The `params` collection and the other collections of a variables dict.

    >>> split_variables({"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}})
    ({'w': 1.0}, {'batch_stats': {'mean': 0.0}})
    """
    if isinstance(params, Mapping) and "params" in params:
        # Intermediates left over from `init` would be appended to, and shadow this run's.
        rest = {name: value for name, value in params.items() if name not in ("params", "intermediates")}
        return params["params"], rest
    return params, {}


def named_leaves(params: Any) -> dict[Path, Any]:
    """The leaves of `params` by path ('block_0/Dense_0/kernel'), each checked to be an array.

    Raises:
        TypeError: a leaf is no array of numbers.
        ValueError: there are no leaves, or two have one path.
    """
    if hasattr(params, "apply_fn") and hasattr(params, "params"):
        raise TypeError(f"`params` is a {type(params).__name__}: pass its `.params`")
    named: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = "/".join(_key(key) for key in _unboxed(keys))
        if not _is_array(leaf):
            where = f"holds a {type(leaf).__name__} at {path!r}" if path else f"is a {type(leaf).__name__}"
            raise TypeError(f"`params` {where}: every leaf must be an array of numbers")
        if path in named:
            raise ValueError(f"`params` has two leaves with the path {path!r}")
        named[path] = leaf
    if not named:
        raise ValueError(f"`params` has no arrays, got {params!r}: pass the trained parameters")
    return named


@dataclasses.dataclass(frozen=True)
class _LinenFunction:
    """`module.apply`, captured: equal for equal modules and equal static arguments."""

    module: nn.Module
    statics: tuple[tuple[str, Any], ...]
    capture: bool = True

    def without_capture(self) -> Function:
        return dataclasses.replace(self, capture=False)

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]:
        state, batch, arrays = inputs
        keywords = {**dict(self.statics), **arrays}
        variables = {**state, "params": params}
        mutable = _mutable(keywords.pop("mutable", False))
        if self.capture and isinstance(mutable, list):
            capture = {"capture_intermediates": True, "mutable": [*mutable, "intermediates"]}
            # Capture fails where plain apply works (nn.cond, for one): the walk then goes without it.
            try:
                outputs, updates = self.module.apply(variables, *batch, **keywords, **capture)
            except (*_MISFITS, jax.errors.UnexpectedTracerError):
                pass
            else:
                captured = _captured(updates.get("intermediates") or {})
                return (outputs, dict(updates)) if mutable else outputs, captured
        plain = {"mutable": mutable or False}
        return _named_misfit(functools.partial(self.module.apply, **keywords, **plain), variables, batch), {}


@dataclasses.dataclass(frozen=True, eq=False)
class _TracedFunction:
    """A function as the program it was traced to; its arrays are inputs, its text is its identity."""

    closed: ClosedJaxpr
    identity: tuple[Any, ...]

    def without_capture(self) -> Function:
        return self

    def __call__(self, params: Any, inputs: Any) -> tuple[Any, dict[Path, jax.Array]]:
        arguments, constants = inputs
        closed = ClosedJaxpr(self.closed.jaxpr, constants)
        return jaxpr_as_fun(closed)(*jax.tree.leaves((params, arguments))), {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TracedFunction) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def _call(apply_fn: Callable, whole: bool, statics: tuple, params: Any, inputs: Any) -> Any:
    state, batch, arrays = inputs
    variables = {**state, "params": params} if whole else params
    return _named_misfit(functools.partial(apply_fn, **dict(statics), **arrays), variables, batch)


def _named_misfit(apply: Callable, variables: Any, batch: tuple) -> Any:
    """Call the user's function; what it raises is told in terms of our arguments."""
    try:
        return apply(variables, *batch)
    except _MISFITS as error:
        shapes = ", ".join(str(jax.tree.map(jnp.shape, item)) for item in batch)
        raise ValueError(
            f"`apply_fn` does not accept these `params` with a `batch` of shape {shapes}. It raised "
            f"{type(error).__name__}: {_first_line(error)}. `batch` is the model's input as `apply_fn` "
            "takes it (a tuple is several positional inputs); a function that wants a variables dict gets "
            "{'params': params} as `params`; keyword arguments and `rngs` are passed on."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "(no message)"


def _trace(function: Callable, params: Any, inputs: Any) -> tuple[_TracedFunction, list[Any]]:
    closed = jax.make_jaxpr(function)(params, inputs)
    text = str(closed.jaxpr)
    # An address in the text (a Python callback) may be reused by another object: equal to itself alone.
    unique = object() if " at 0x" in text else None
    # Arrays that inner calls closed over are neither in the text nor among the inputs.
    nested = tuple(_Same(const) for const in _nested_constants(closed.jaxpr))
    structure = jax.tree.structure((params, inputs))
    identity = (text, nested, structure, unique, tuple(jnp.shape(const) for const in closed.consts))
    return _TracedFunction(ClosedJaxpr(closed.jaxpr, closed.consts), identity), list(closed.consts)


class _Same:
    """Equal to a wrapper of the same object alone; keeps the object, so that its id is not reused."""

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


def _bound_module(apply_fn: Callable) -> tuple[nn.Module | None, dict[str, Any]]:
    """The Linen module behind `model.apply`, a jit of it, or a partial with keywords only."""
    if isinstance(apply_fn, functools.partial) and not apply_fn.args:
        module, keywords = _bound_module(apply_fn.func)
        return module, {**keywords, **apply_fn.keywords}
    if isinstance(apply_fn, type(jax.jit(_key))):
        return _bound_module(apply_fn.__wrapped__)  # pyright: ignore
    if getattr(apply_fn, "__func__", None) is nn.Module.apply:
        return apply_fn.__self__, {}  # pyright: ignore
    return None, {}


def _captured(intermediates: Mapping[str, Any]) -> dict[Path, jax.Array]:
    """Module outputs by module path; the calls of a shared module are numbered from the second on."""
    captured: dict[Path, jax.Array] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(intermediates)[0]:
        names = [_key(key) for key in keys]
        if "__call__" not in names or not _alive(leaf):
            continue
        at = names.index("__call__")
        path = "/".join(names[:at])
        calls = [number for number in names[at + 1 :] if number != "0"]
        captured["#".join([path, *calls])] = leaf
    return captured


def _alive(leaf: Any) -> bool:
    """False for a tracer that leaked out of a transformation inside the module (a raw vmap)."""
    if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 1:
        return False
    try:
        _ = jnp.negative(leaf)
    except jax.errors.UnexpectedTracerError:
        return False
    return True


def _mutable(mutable: Any) -> Any:
    """The collections to mutate as a list; True or a filter stays as it is, and nothing is captured."""
    if mutable is False:
        return []
    return [mutable] if isinstance(mutable, str) else list(mutable) if isinstance(mutable, tuple) else mutable


def _check_batch(batch: tuple) -> int | None:
    sizes: list[int] = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        if not _is_array(leaf):
            raise TypeError(
                f"`batch` holds a {type(leaf).__name__} at {jax.tree_util.keystr(keys)}: it must be an "
                "array of numbers, a tree of them, or a tuple of several inputs; encode text first"
            )
        if jnp.size(leaf) == 0:
            raise ValueError(f"`batch` is empty: an array of shape {jnp.shape(leaf)} holds no examples")
        if jnp.ndim(leaf):
            sizes.append(jnp.shape(leaf)[0])
    if not jax.tree.leaves(batch):
        raise ValueError("`batch` holds no arrays: pass the model's input")
    return sizes[0] if sizes else None


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biuf" or jnp.issubdtype(leaf.dtype, jnp.floating)
    return isinstance(leaf, (jax.Array, np.number, np.bool_, bool, int, float))


def _has_array(value: Any) -> bool:
    return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))


def _hashable(value: Any) -> bool:
    try:
        _ = hash(value)
    except TypeError:
        return False
    return True


def _unboxed(keys: tuple) -> tuple:
    # A boxed parameter (nn.Partitioned) adds a last key `.value`.
    boxed = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value"
    return keys[:-1] if boxed else keys


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
