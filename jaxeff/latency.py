"""How long functions take, measured: compiled before, warm, and blocked until their results are there.

Imports nothing of jaxeff.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long a compiled function takes, from its call until its results are there.

    Attributes:
        seconds: of each run, in order.
        compile_seconds: how long it took to trace and compile.
    """

    seconds: tuple[float, ...]
    compile_seconds: float

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def percentile_10(self) -> float:
        return float(np.percentile(self.seconds, 10))

    @property
    def percentile_90(self) -> float:
        return float(np.percentile(self.seconds, 90))


def latencies(
    calls: Mapping[str, tuple[Callable, Sequence[Any]]], *, repeats: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Time several functions in turn, so that what else the machine does hits all alike.

    Args:
        calls: `(function, arguments)` by name. Arguments are put on the device beforehand.
        repeats: timed runs of each. Every second round goes backwards, so that none always follows the same
            other.
        warmup: runs before, which are not timed.

    >>> import jax.numpy as jnp
    >>> found = latencies({"sine": (jnp.sin, (jnp.ones(8),)), "cosine": (jnp.cos, (jnp.ones(8),))}, repeats=5)
    >>> len(found["sine"].seconds), found["cosine"].percentile_10 <= found["cosine"].median
    (5, True)
    """
    programs = {}
    compile_seconds = {}
    for name, (function, arguments) in calls.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        compile_seconds[name] = time.perf_counter() - start
        programs[name] = compiled, jax.device_put(tuple(arguments))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(-warmup, repeats):
        for name in [*programs][:: -1 if number % 2 else 1]:
            compiled, arguments = programs[name]
            start = time.perf_counter()
            _ = jax.block_until_ready(compiled(*arguments))
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Latency(tuple(found), compile_seconds[name]) for name, found in seconds.items()}
