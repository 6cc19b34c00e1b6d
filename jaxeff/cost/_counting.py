"""Count what a model does: params, apply_fn, batch -> Cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr

from jaxeff import graph
from jaxeff.cost import _training as training
from jaxeff.cost._compiling import check_function
from jaxeff.cost._records import Cost
from jaxeff.cost._tally import Owner, Tally, module_path, tally
from jaxeff.graph import axes
from jaxeff.graph.program import Operation
from jaxeff.graph.provenance import CONSTANT_CONTRACTION, CONTRACTION, CONTRACTIONS, trace_weights
from jaxeff.model import apply as models
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import Bound
from jaxeff.model.functions import LinenFunction
from jaxeff.model.params import Params


def count(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    loss_fn: Callable | None = None,
    targets: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Cost:
    """Count the operations of a model from its traced program; nothing is compiled, run or allocated.

    A scan counts as its body times its length, a `cond` as the largest of its branches, and a `while` as one
    iteration. `statements` lists the last two, and every operation that is not counted.

    Args:
        params: the variables dict, its `params` collection, or the params from `jaxeff.functional`; arrays or
            `jax.ShapeDtypeStruct` (`jax.eval_shape(model.init, ...)`). Or a model that `jaxeff.functional` takes,
            followed by the batch.
        apply_fn: as in `jaxeff.analyze`.
        batch: the model's input, arrays or shapes; a tuple holds several positional inputs.
        loss_fn, targets: also count the backward pass, from the traced gradient of the mean of
            `loss_fn(outputs, targets)` with respect to `params`. The forward pass is then that of training: it
            includes the loss, and the derivatives that JAX prepares on the way.
        optimizer: an Optax optimizer; also count one update, from its traced program.
        rngs: passed to `apply_fn` as `rngs`; keys or their shapes.
        **apply_kwargs: passed to `apply_fn`.

    Returns:
        Exact MACs and FLOPs of the whole batch: `cost.total`, by phase, operator, module and layer, and
        `cost.per_example`.

    Raises:
        TypeError: an argument has the wrong type, or `apply_fn` does not accept the arguments.
        ValueError: an argument is invalid.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> model, x = nn.Dense(4), jax.ShapeDtypeStruct((8, 3), jnp.float32)
    >>> cost = count(jax.eval_shape(model.init, jax.random.key(0), x), model.apply, x)
    >>> cost.macs, cost.flops, cost.per_example.macs
    (96, 224, 12)
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    own = Params.of(params, abstract=True)
    training.check_loss(loss_fn, targets)
    bound = models.bind(own, apply_fn, batch, rngs, apply_kwargs, abstract=True)
    root = _root(bound)
    traced = training.trace(bound)
    described = list(own.named.items())
    if loss_fn is None:
        forward = graph.flatten(traced.closed)
        found = [tally(forward, "forward", _by_use(_owners(forward, bound, described)), root)]
    else:
        gradient = training.differentiated(bound, traced, loss_fn, targets)
        forward, backward = graph.flatten(gradient.forward), graph.flatten(gradient.backward)
        described.sort(key=lambda leaf: not _floating(leaf[1]))
        owners = _owners(forward, bound, described)
        found = [
            tally(forward, "forward", _by_use(owners), root),
            tally(backward, "backward", _by_module(forward, owners, root), root),
        ]
    if optimizer is not None:
        program = graph.flatten(training.update(bound.params, optimizer))
        found.append(tally(program, "optimizer", _nobody, root))
    return _cost(found, bound.batch_size, (params, batch))


def count_function(function: Callable, *arguments: Any, **keywords: Any) -> Cost:
    """Count any function of arrays or shapes, without layers and examples.

    Raises:
        TypeError: `function` is not a function.

    >>> count_function(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4))).macs
    24
    """
    check_function(function, "its arguments follow; `cost.count(params, apply_fn, batch)` counts a model")
    return of_program(jax.make_jaxpr(function)(*arguments, **keywords), (arguments, keywords))


def of_program(closed: ClosedJaxpr, arguments: Any) -> Cost:
    """Count a traced program. The layout of the arguments determines its number of devices."""
    return _cost([tally(graph.flatten(closed), "forward", _nobody, "")], None, arguments)


def _owners(
    program: graph.Program, bound: Bound, described: Sequence[tuple[str, Any]]
) -> dict[Operation, str]:
    """Return the weight that meets data in each contraction of the forward pass; several as 'query + key'.

    Args:
        described: path and leaf of each of the program's first inputs.
    """
    shapes = [tuple(jnp.shape(leaf)) for _, leaf in described]
    weights = {
        value: {index: axes.of_weight(shapes[index])}
        for index, value in enumerate(program.inputs[: len(described)])
        if _floating(described[index][1])
    }
    rest = zip(program.inputs[len(described) :], bound.origins, strict=False)
    batch = [value for value, origin in rest if origin == "batch"]
    owners: dict[Operation, dict[str, None]] = {}
    for use in trace_weights(program, weights, shapes, (), batch).uses:
        if use.operation is not None and use.role in (CONTRACTION, CONSTANT_CONTRACTION):
            owners.setdefault(use.operation, {})[described[use.leaf][0]] = None
    return {operation: " + ".join(paths) for operation, paths in owners.items()}


def _by_use(owners: Mapping[Operation, str]) -> Owner:
    return lambda operation, _: owners.get(operation)


def _by_module(forward: graph.Program, owners: Mapping[Operation, str], root: str) -> Owner:
    """Return, for the backward pass, the weight of each module whose forward pass contracts only that one."""
    held: dict[str, set[str | None]] = {}
    for operation in _contractions(forward):
        held.setdefault(module_path(operation.scope, root), set()).add(owners.get(operation))

    def owner(operation: Operation, module: str) -> str | None:
        named = bool(module_path(operation.scope, ""))
        known = held.get(module, set()) if named and operation.name in CONTRACTIONS else set()
        return next(iter(known)) if len(known) == 1 else None

    return owner


def _contractions(program: graph.Program) -> Iterator[Operation]:
    for operation in program.operations:
        if operation.name in CONTRACTIONS:
            yield operation
        for body in operation.bodies:
            yield from _contractions(body)


def _nobody(operation: Operation, module: str) -> str | None:
    return None


def _floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(training.dtype_of(leaf), jnp.floating))


def _root(bound: Bound) -> str:
    """Return the name that a Linen model gives itself in the scopes of its operations."""
    function = bound.function
    return (
        (function.module.name or type(function.module).__name__)
        if isinstance(function, LinenFunction)
        else ""
    )


def _cost(found: Sequence[Tally], batch_size: int | None, arguments: Any) -> Cost:
    laid_out = _devices(arguments)
    devices = max(laid_out, *(one.devices for one in found))
    entries = [entry for one in found for entry in one.entries]
    if laid_out > max(one.devices for one in found):
        # XLA decides how the work is divided; the program does not say.
        entries = [dataclasses.replace(entry, per_device=None) for entry in entries]
    statements = tuple(statement for one in found for statement in one.said)
    return Cost(tuple(entries), statements, batch_size, devices)


def _devices(arguments: Any) -> int:
    """Return the number of devices over which the arguments are laid out."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)]
    return max((sharding.num_devices for sharding in shardings if sharding is not None), default=1)
