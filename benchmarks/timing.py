"""Timing for benchmarks: warm, blocked, interleaved, medians with their spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import flax
import jax
import jaxlib


def machine() -> str:
    device = jax.devices()[0]
    return (
        f"{device.platform} ({device.device_kind}), {platform.machine()}, "
        f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"flax {flax.__version__}"
    )


def seconds() -> float:
    """CPU seconds of all threads, which other work lengthens less; on an accelerator those that pass."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run; all functions once in turn, `repeats` times over, so that drift hits all alike.

    Args:
        clock: `seconds`, for CPU seconds.
    """
    for function in functions.values():
        _ = jax.block_until_ready(function())
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            _ = jax.block_until_ready(function())
            spent[name].append(clock() - start)
    return spent


def ratios(seconds: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """Run by run: how many times longer than the base's run beside it."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"
