"""The measured time of a function, and what bounds it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.cost import _compiling as compiling
from jaxeff.cost._compiling import Compiled
from jaxeff.cost._counting import of_program
from jaxeff.cost._records import Cost
from jaxeff.cost._work import amounts
from jaxeff.output.shown import Shown
from jaxeff.output.text import duration, number, percent, terminal_width, wrapped

# Below this share of both peaks, neither bounds the program.
_NEAR = 0.25


@dataclasses.dataclass(frozen=True, repr=False)
class Peak(Shown):
    """Measured peak rates of one device.

    Attributes:
        device: name of the device.
        dtype: of the matrix product.
        flops_per_second: of the product of two square matrices.
        bytes_per_second: read and written by the copy of an array too large for caches.
    """

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float

    @property
    def balance(self) -> float:
        """FLOPs per byte at which arithmetic and memory take equally long."""
        return self.flops_per_second / self.bytes_per_second


def peak(dtype: Any = jnp.float32, *, width: int = 2048, copied: int = 2**28, device: Any = None) -> Peak:
    """Measure a device: the best of five products of two matrices, and of five copies.

    Call it once, and pass the result to each `latency`.

    Args:
        dtype: of the matrices; use the dtype of the models to compare with. JAX's default matmul precision applies.
        width: rows and columns of the matrices. Accelerators need more than CPUs to reach their peak.
        copied: bytes of the array to copy; use several times the largest cache.
        device: the default device unless given.
    """
    device = jax.local_devices()[0] if device is None else device
    with jax.default_device(device):
        matrix = jnp.full((width, width), 1 / width, dtype)
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        (products,) = _in_turn([lambda: product(matrix, matrix)], repeats=5, warmup=2)
        copy_seconds = min(_copies(copied // 4, repeats=5))
    return Peak(
        device=device.device_kind,
        dtype=jnp.dtype(dtype).name,
        flops_per_second=2 * width**3 / min(products),
        bytes_per_second=2 * 4 * (copied // 4) / copy_seconds,
    )


def _copies(size: int, repeats: int) -> list[float]:
    """Return the seconds of each copy of an array onto itself; new memory would be mapped page by page."""
    # An addition, because the compiler may drop a plain copy.
    copy = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = jax.block_until_ready(copy(jnp.zeros(size, jnp.float32)))
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        array = jax.block_until_ready(copy(array))
        seconds.append(time.perf_counter() - start)
    return seconds


@dataclasses.dataclass(frozen=True, repr=False)
class Latency(Shown):
    """Time of a compiled function, from the call until its results are ready.

    Attributes:
        seconds: of each run, in order.
        cost: counted from its program.
        compiled: XLA's figures, and the time it took to compile.
        peak: of the device, if it was given.
    """

    seconds: tuple[float, ...]
    cost: Cost
    compiled: Compiled
    peak: Peak | None

    @property
    def median(self) -> float:
        """Seconds."""
        return self._percentile(50)

    @property
    def percentile_10(self) -> float:
        """Seconds; one run in ten is faster."""
        return self._percentile(10)

    @property
    def percentile_90(self) -> float:
        """Seconds; nine runs in ten are faster."""
        return self._percentile(90)

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def flops_per_second(self) -> float:
        """Counted FLOPs over the median time."""
        return self.cost.flops / self.median

    @property
    def bytes_moved(self) -> int | None:
        """Arguments read and results written, once each: the minimum that memory has to move."""
        compiled = self.compiled
        if compiled.argument_bytes is None or compiled.output_bytes is None:
            return None
        return (compiled.argument_bytes + compiled.output_bytes) * compiled.devices

    @property
    def arithmetic_intensity(self) -> float | None:
        """FLOPs per byte of `bytes_moved`: an upper bound, since intermediate arrays may leave the caches."""
        return None if not self.bytes_moved else self.cost.flops / self.bytes_moved

    @property
    def compute_share(self) -> float | None:
        """FLOPs per second as a share of the peak; None without a peak."""
        if self.peak is None:
            return None
        return self.flops_per_second / (self.peak.flops_per_second * self.compiled.devices)

    @property
    def memory_share(self) -> float | None:
        """`bytes_moved` per second as a share of the peak; None without a peak. Caches can lift it above 1."""
        if self.peak is None or self.bytes_moved is None:
            return None
        return self.bytes_moved / self.median / (self.peak.bytes_per_second * self.compiled.devices)

    @property
    def bound(self) -> str | None:
        """'compute' or 'memory', whichever is nearer to its peak; 'neither' if both are below a quarter.

        'neither' means that the time goes elsewhere: dispatch, small or serial operations, transcendentals, or
        intermediate arrays in memory. None without a peak.
        """
        compute, memory = self.compute_share, self.memory_share
        if compute is None or memory is None:
            return None
        if max(compute, memory) < _NEAR:
            return "neither"
        return "compute" if compute >= memory else "memory"

    def __str__(self) -> str:
        return _render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, including the derived numbers."""
        derived = (
            "median", "percentile_10", "percentile_90", "flops_per_second", "bytes_moved",
            "arithmetic_intensity", "compute_share", "memory_share", "bound",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in derived},
            "seconds": list(self.seconds),
            "cost": self.cost.to_dict(),
            "compiled": self.compiled.to_dict(),
            "peak": None if self.peak is None else dataclasses.asdict(self.peak),
        }


def latency(
    function: Callable,
    *arguments: Any,
    repeats: int = 30,
    warmup: int = 3,
    peak: Peak | None = None,
    **keywords: Any,
) -> Latency:
    """Time a function: compiled beforehand, warm, and blocked until its results are ready.

    Args:
        function: any function of arrays, or a result of `jax.jit` without static or donated arguments; every run
            gets the same arguments.
        *arguments, **keywords: arrays, which each run reads where they lie.
        repeats: number of timed runs.
        warmup: number of untimed runs before.
        peak: of the device, from `jaxeff.cost.peak`, to say what bounds the function.

    Raises:
        TypeError: `function` is not a function.
        ValueError: `repeats` or `warmup` is too small, an argument is a shape, or one is donated.

    >>> found = latency(lambda x: x @ x, jnp.ones((16, 16)), repeats=5)
    >>> found.cost.macs, found.percentile_10 <= found.median <= found.percentile_90
    (4096, True)
    """
    _check_counts(repeats, warmup)
    run, cost, compiled = _prepared(function, arguments, keywords)
    (seconds,) = _in_turn([run], repeats, warmup)
    return Latency(seconds, cost, compiled, peak)


def latencies(
    calls: Mapping[str, tuple[Callable, tuple[Any, ...]]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    peak: Peak | None = None,
) -> dict[str, Latency]:
    """Time several functions in turn, so that other load on the machine affects all alike.

    Compare run by run: the n-th run of each was next to the n-th of the others.

    Args:
        calls: `(function, arguments)` by name, each as in `latency`.
        repeats, warmup, peak: as in `latency`. Every second round goes backwards, so that no function always runs
            after the same other one.

    Raises:
        ValueError: as in `latency`.

    >>> array = jnp.ones((16, 16))
    >>> calls = {"product": (jnp.matmul, (array, array)), "sum": (jnp.add, (array, array))}
    >>> found = latencies(calls, repeats=5)
    >>> found["product"].cost.macs, len(found["sum"].seconds)
    (4096, 5)
    """
    _check_counts(repeats, warmup)
    prepared = [_prepared(function, arguments, {}) for function, arguments in calls.values()]
    seconds = _in_turn([run for run, _, _ in prepared], repeats, warmup)
    return {
        name: Latency(own, cost, compiled, peak)
        for name, own, (_, cost, compiled) in zip(calls, seconds, prepared, strict=True)
    }


def _check_counts(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise ValueError(f"`repeats` must be 1 or more and `warmup` 0 or more, got {repeats} and {warmup}")


def _prepared(
    function: Callable, arguments: tuple, keywords: Mapping[str, Any]
) -> tuple[Callable[[], Any], Cost, Compiled]:
    """Compile a function; return a call on its arguments, its cost and XLA's figures."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((arguments, keywords))):
        raise ValueError(
            "an argument is a jax.ShapeDtypeStruct: `latency` runs the function and needs arrays"
        )
    compilation = compiling.compile(function, arguments, keywords)
    if compilation.donates:
        raise ValueError("`function` donates an argument, which a second run could not read: jit it without")
    cost = of_program(compilation.traced, (arguments, keywords))
    # Host arrays would be copied to the device in every run.
    placed, named = jax.device_put((arguments, keywords))
    return lambda: compilation.program(*placed, **named), cost, compilation.figures


def _in_turn(runs: Sequence[Callable[[], Any]], repeats: int, warmup: int) -> list[tuple[float, ...]]:
    """Return the seconds of each run of each function, with one run of each per round."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(-warmup, repeats):
        for which in range(len(runs))[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            _ = jax.block_until_ready(runs[which]())
            if turn >= 0:
                seconds[which].append(time.perf_counter() - start)
    return [tuple(own) for own in seconds]


def _render(latency: Latency) -> str:
    """Render the times, and what bounds them."""
    compiled, shown = latency.compiled, latency.seconds
    lines = [
        f"{duration(latency.median)} a run (10th percentile {duration(latency.percentile_10)}, 90th "
        f"{duration(latency.percentile_90)}, {len(shown)} runs); compiled before in "
        f"{duration(compiled.lower_seconds + compiled.compile_seconds)}.",
        f"{amounts(latency.cost.total)}: {number(latency.flops_per_second)} FLOPs a second.",
    ]
    if latency.arithmetic_intensity is not None:
        lines[-1] += f" At most {latency.arithmetic_intensity:.3g} FLOPs a byte."
    peak = latency.peak
    if peak is not None and latency.compute_share is not None and latency.memory_share is not None:
        bound = "by neither" if latency.bound == "neither" else f"by {latency.bound}"
        lines.append(
            f"{percent(latency.compute_share)} of the arithmetic and {percent(latency.memory_share)} of the "
            f"memory traffic that {peak.device} reaches in {peak.dtype}: bounded {bound}."
        )
    if not latency.cost.complete:
        lines.append("Not all of it is in these numbers: see `cost.statements`.")
    width = terminal_width()
    return "\n".join(line for said in lines for line in wrapped(said, width))
