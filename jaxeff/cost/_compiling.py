"""XLA's figures of a compiled function, for one device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's own figures of a compiled program, per device. None if the backend does not report them.

    Attributes:
        devices: number of devices that run it.
        flops: XLA's count. It counts the body of every loop once, skips padding, and does not see into
            library calls.
        transcendentals: elements of exp, log, tanh and the like, counted in the same way.
        bytes_accessed: bytes that the operations read and write, in memory or cache; loops count once.
        argument_bytes, output_bytes: of arguments and results.
        alias_bytes: of results that reuse a donated argument.
        scratch_bytes: maximum of the intermediate arrays at one time.
        code_bytes: of the program itself.
        lower_seconds, compile_seconds: time to trace and lower the function, and to compile it.
    """

    devices: int
    flops: float | None
    transcendentals: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    scratch_bytes: int | None
    code_bytes: int | None
    lower_seconds: float
    compile_seconds: float

    @property
    def peak_bytes(self) -> int | None:
        """Arguments, results and scratch together: the maximum at one time."""
        parts = self.argument_bytes, self.output_bytes, self.scratch_bytes, self.alias_bytes
        if None in parts:
            return None
        arguments, outputs, scratch, alias = (part or 0 for part in parts)
        return arguments + outputs + scratch - alias

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def compiled(function: Callable, *arguments: Any, **keywords: Any) -> Compiled:
    """Compile a function for these arguments or shapes and return XLA's figures; nothing runs.

    Args:
        function: any function of arrays, or a result of `jax.jit`, whose options then apply.
        *arguments, **keywords: arrays or `jax.ShapeDtypeStruct`. If they are laid out over devices, the figures
            are those of one device's part.

    Raises:
        TypeError: `function` is not a function.

    >>> import jax.numpy as jnp
    >>> found = compiled(jnp.dot, jnp.ones((8, 4)), jnp.ones((4, 2)))
    >>> found.argument_bytes, found.output_bytes
    (160, 64)
    """
    return compile(function, arguments, keywords).figures


def check_function(function: Any, how: str) -> None:
    if not callable(function):
        raise TypeError(
            f"`function` must be a function, got {type(function).__name__}: it comes first, and {how}"
        )


class Compilation(NamedTuple):
    """A compiled function, its traced program, whether it donates arguments, and XLA's figures."""

    program: jax.stages.Compiled
    traced: Any
    donates: bool
    figures: Compiled


def compile(function: Callable, arguments: tuple, keywords: Mapping[str, Any]) -> Compilation:
    """Trace, lower and compile, each once."""
    check_function(function, "its arguments follow: (apply_fn, params, batch)")
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    start = time.perf_counter()
    traced = jitted.trace(*arguments, **keywords)
    lowered = traced.lower()
    between = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    donates = any(argument.donated for argument in jax.tree.leaves(lowered.args_info))
    return Compilation(program, traced.jaxpr, donates, _figures(program, between - start, done - between))


def _figures(program: jax.stages.Compiled, lower: float, compile: float) -> Compiled:
    costs = program.cost_analysis() or {}
    memory: Any = program.memory_analysis()
    # Some backends return one dictionary per computation.
    costs = costs[0] if isinstance(costs, (list, tuple)) else costs

    def size(name: str) -> int | None:
        found = getattr(memory, f"{name}_size_in_bytes", None)
        return None if found is None else int(found)

    return Compiled(
        devices=_devices(program),
        flops=_known(costs, "flops"),
        transcendentals=_known(costs, "transcendentals"),
        bytes_accessed=_known(costs, "bytes accessed"),
        argument_bytes=size("argument"),
        output_bytes=size("output"),
        alias_bytes=size("alias"),
        scratch_bytes=size("temp"),
        code_bytes=size("generated_code"),
        lower_seconds=lower,
        compile_seconds=compile,
    )


def _known(costs: Mapping[str, float], name: str) -> float | None:
    """Return a figure, or None for -1, which is XLA's unknown. A missing figure is 0."""
    if not costs:
        return None
    found = costs.get(name, 0.0)
    return None if found < 0 else float(found)


def _devices(program: jax.stages.Compiled) -> int:
    shardings = jax.tree.leaves((program.input_shardings, program.output_shardings))
    return max((len(sharding.device_set) for sharding in shardings), default=1)
