"""Memory of a model: params, apply_fn, batch -> Memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxeff import graph
from jaxeff.cost import _training as training
from jaxeff.cost._compiling import Compiled, compiled
from jaxeff.cost._storage import Storage, storage
from jaxeff.graph.program import Value
from jaxeff.model import apply as models
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import Bound
from jaxeff.model.params import Params
from jaxeff.output import text
from jaxeff.output.shown import Shown

POLICY = jax.checkpoint_policies.dots_saveable


@dataclasses.dataclass(frozen=True)
class Size:
    """Number of elements, and their bytes on all devices together (one copy of each)."""

    elements: int
    bytes: int

    def __add__(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class SavedResidual:
    """One array that the forward pass saves for the backward pass, other than parameters and inputs.

    Attributes:
        operator: primitive that made it.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, repr=False)
class GradientMemory(Shown):
    """Memory of a gradient.

    Attributes:
        kept: arrays that JAX saves for the backward pass, largest first. XLA may save fewer, as it fuses and
            recomputes cheap ones.
        compiled: XLA's figures of the compiled gradient, per device; None if it was not compiled.
    """

    kept: tuple[SavedResidual, ...]
    compiled: Compiled | None

    @property
    def kept_bytes(self) -> int:
        return sum(array.bytes for array in self.kept)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept_bytes": self.kept_bytes,
            "kept": [dataclasses.asdict(array) for array in self.kept],
            "compiled": None if self.compiled is None else self.compiled.to_dict(),
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Memory(Shown):
    """Bytes of a model. `str(memory)` is a table as wide as the terminal, up to 100 columns.

    Attributes:
        parameters: by dtype.
        state: other variables, such as running averages, by dtype.
        optimizer_state: by dtype; None without an optimizer.
        parameter_bytes_per_device: bytes of the parameters on one device, as they are laid out; None for shapes
            without a layout.
        forward: XLA's figures of the compiled forward pass; None if it was not compiled.
        without_remat: the gradient of the loss without rematerialization; None without a loss.
        with_remat: the same with the model's own `jax.checkpoint` (Flax's `remat`), if it has any; otherwise
            with the whole model under `jax.checkpoint` and the given policy.
        own_remat: whether `with_remat` uses the model's own `jax.checkpoint`.
        storage: of each pruned weight; empty without masks.
    """

    parameters: dict[str, Size]
    state: dict[str, Size]
    optimizer_state: dict[str, Size] | None
    parameter_bytes_per_device: int | None
    forward: Compiled | None
    without_remat: GradientMemory | None
    with_remat: GradientMemory | None
    own_remat: bool
    storage: dict[str, Storage]

    @property
    def parameter_bytes(self) -> int:
        return sum(size.bytes for size in self.parameters.values())

    @property
    def optimizer_bytes(self) -> int | None:
        state = self.optimizer_state
        return None if state is None else sum(size.bytes for size in state.values())

    def __str__(self) -> str:
        return _render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, including the derived numbers."""
        return {
            **dataclasses.asdict(self),
            "parameter_bytes": self.parameter_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "forward": None if self.forward is None else self.forward.to_dict(),
            "without_remat": None if self.without_remat is None else self.without_remat.to_dict(),
            "with_remat": None if self.with_remat is None else self.with_remat.to_dict(),
            "storage": {path: found.to_dict() for path, found in self.storage.items()},
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def memory(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    loss_fn: Callable | None = None,
    targets: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    masks: Any = None,
    policy: Callable = POLICY,
    compile: bool = True,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Memory:
    """Return the memory of a model, from shapes and XLA's figures of the compiled program; nothing runs.

    Args:
        params, apply_fn, batch, rngs, **apply_kwargs: as in `jaxeff.cost.count`, arrays or shapes.
        loss_fn, targets: also measure the gradient of the mean of `loss_fn(outputs, targets)`, with and without
            rematerialization.
        optimizer: also count the bytes of its state.
        masks: from `jaxeff.prune.masks`; also count the bytes of each pruned weight, stored in four ways.
        policy: of `jax.checkpoint`, for a model without its own: which results to save. By default the results
            of products are saved and everything pointwise is recomputed.
        compile: whether to compile, which can take minutes. If False, XLA's figures are None.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or does not match the others.

    >>> import flax.linen as nn, optax
    >>> model, x = nn.Dense(4), jax.ShapeDtypeStruct((8, 3), jnp.float32)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> found = memory(variables, model.apply, x, optimizer=optax.adam(1e-3), compile=False)
    >>> found.parameter_bytes, found.optimizer_bytes
    (64, 132)
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    own = Params.of(params, abstract=True)
    training.check_loss(loss_fn, targets)
    bound = models.bind(own, apply_fn, batch, rngs, apply_kwargs, abstract=True)
    state = own.state or getattr(apply_fn, "state", {})
    optimizer_state = None
    if optimizer is not None:
        shapes = training.abstract(training.split_floating(own.tree)[0])
        optimizer_state = sizes(jax.eval_shape(optimizer.init, shapes))
    traced = training.trace(bound)
    forward = compiled(traced, bound.params, bound.inputs) if compile else None
    kept_whole = training.without_remat(traced)
    without = remat = None
    if loss_fn is not None:
        chosen = traced if kept_whole else jax.checkpoint(traced, policy=policy)
        without = _gradient(bound, kept_whole or traced, loss_fn, targets, compile)
        remat = _gradient(bound, chosen, loss_fn, targets, compile)
    return Memory(
        parameters=sizes(own.tree),
        state=sizes(state),
        optimizer_state=optimizer_state,
        parameter_bytes_per_device=_per_device(own.tree),
        forward=forward,
        without_remat=without,
        with_remat=remat,
        own_remat=kept_whole is not None,
        storage={} if masks is None else storage(own, masks),
    )


def sizes(tree: Any) -> dict[str, Size]:
    """Return elements and bytes of a tree's leaves, by dtype."""
    found: dict[str, Size] = {}
    for leaf in jax.tree.leaves(tree):
        dtype = training.dtype_of(leaf)
        elements = math.prod(jnp.shape(leaf))
        found[str(dtype)] = found.get(str(dtype), Size(0, 0)) + Size(elements, elements * dtype.itemsize)
    return found


def _per_device(tree: Any) -> int | None:
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return None
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _gradient(
    bound: Bound, call: training.Call, loss_fn: Callable, targets: Any, compile: bool
) -> GradientMemory:
    kept = _kept(training.differentiated(bound, call, loss_fn, targets))
    if not compile:
        return GradientMemory(kept, None)
    loss = training.loss_of(call, loss_fn)
    params, rest = training.split_floating(bound.params)

    def gradient(params: Any, rest: Any, inputs: Any, targets: Any) -> Any:
        return jax.value_and_grad(lambda params: loss(training.joined(params, rest), inputs, targets))(params)

    return GradientMemory(kept, compiled(gradient, params, rest, bound.inputs, targets))


def _kept(gradient: training.Gradient) -> tuple[SavedResidual, ...]:
    """Return the arrays that the forward program makes and passes to the backward program."""
    program = graph.flatten(gradient.forward)
    count = len(program.outputs)
    handed = dict.fromkeys(
        output for output in program.outputs[count - gradient.kept :] if isinstance(output, Value)
    )
    given = {*program.inputs, *program.constants}
    made = {output: operation.name for operation in program.operations for output in operation.outputs}
    found = [
        SavedResidual(made[value], value.shape, str(value.dtype)) for value in handed if value not in given
    ]
    return tuple(_largest_first(found))


def _largest_first(found: Iterable[SavedResidual]) -> list[SavedResidual]:
    return sorted(found, key=lambda array: array.bytes, reverse=True)


def _render(memory: Memory) -> str:
    """Render a row per part, and one per pruned weight."""
    parts = [*_of_sizes("parameters", memory.parameters), *_of_sizes("state", memory.state)]
    if memory.parameter_bytes_per_device not in (None, memory.parameter_bytes):
        parts.append(("parameters, on one device", _bytes(memory.parameter_bytes_per_device)))
    parts += _of_sizes("optimizer state", memory.optimizer_state or {})
    if memory.forward is not None:
        parts += _of_compiled("forward", memory.forward)
    remat = "gradient with its remat" if memory.own_remat else "gradient under checkpoint"
    for name, gradient in (("gradient without remat", memory.without_remat), (remat, memory.with_remat)):
        if gradient is not None:
            parts.append((f"{name}, activations kept", _bytes(gradient.kept_bytes)))
            parts += [] if gradient.compiled is None else _of_compiled(name, gradient.compiled)
    width = text.terminal_width()
    lines = text.aligned([("memory", "bytes"), *parts], width)
    if memory.storage:
        forms = ("dense", "masked", "packed", "compressed")
        cells = [
            (
                path,
                text.percent(1 - found.kept / found.size),
                *(_bytes(getattr(found, form)) for form in forms),
            )
            for path, found in memory.storage.items()
        ]
        lines += ["", *text.aligned([("weight", "sparsity", *forms), *cells], width)]
    return "\n".join(lines)


def _of_sizes(name: str, sizes: dict[str, Size]) -> list[tuple[str, str]]:
    described = sizes.items()
    return [
        (f"{name}, {dtype} ({text.number(size.elements)})", _bytes(size.bytes)) for dtype, size in described
    ]


def _of_compiled(name: str, found: Compiled) -> list[tuple[str, str]]:
    parts = {"peak": found.peak_bytes, "scratch": found.scratch_bytes}
    return [(f"{name}, {part} (XLA)", _bytes(count)) for part, count in parts.items()]


def _bytes(count: int | None) -> str:
    return text.UNKNOWN if count is None else f"{text.number(count)}B"
