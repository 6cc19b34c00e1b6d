"""Measurement of a smaller network beside the large one: scores, sizes, and times of actual runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.cost import Latency, latencies
from jaxeff.model.apply import Bound, bind
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.output.text import duration


class Ratios(NamedTuple):
    """Ratios of the times of neighboring runs: how many times as long the run before took as the run after."""

    percentile_10: float
    median: float
    percentile_90: float


@dataclasses.dataclass(frozen=True)
class MeasuredNetwork:
    """Measurements of one network.

    Attributes:
        parameters: number of elements of `params`.
        bytes: of `params` and of the other variables (running averages).
        scores: by name.
        latencies: for each batch, with the `cost` counted from its program.
    """

    parameters: int
    bytes: int
    scores: Mapping[str, float]
    latencies: tuple[Latency, ...]

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulates of each batch; `cost.statements` lists operations that are not counted."""
        return tuple(latency.cost.macs for latency in self.latencies)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, with None for scores that are nan or infinite."""
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "scores": {name: value if math.isfinite(value) else None for name, value in self.scores.items()},
            "latencies": [latency.to_dict() for latency in self.latencies],
        }


@dataclasses.dataclass(frozen=True, repr=False)
class BeforeAndAfter(Shown):
    """Two networks measured on the same batches. `str(measured)` is a table.

    Attributes:
        before, after: the large and the small network.
        batch_sizes: leading size of each batch; None for a batch without one.
        device: on which both ran.
    """

    before: MeasuredNetwork
    after: MeasuredNetwork
    batch_sizes: tuple[int | None, ...]
    device: str

    @property
    def speedups(self) -> tuple[Ratios, ...]:
        """Speed-up for each batch, from neighboring runs, which other load on the machine affects alike."""
        pairs = zip(self.before.latencies, self.after.latencies, strict=True)
        ratios = [np.divide(before.seconds, after.seconds) for before, after in pairs]
        return tuple(Ratios(*np.percentile(ratio, (10, 50, 90)).tolist()) for ratio in ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, including every run."""
        return {
            "device": self.device,
            "batch_sizes": list(self.batch_sizes),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "speedups": [ratios._asdict() for ratios in self.speedups],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)

    def __str__(self) -> str:
        return _render(self)


Evaluate = Callable[[Any, Callable], float | jax.Array | Mapping[str, Any]]


def before_and_after(
    before: tuple[Any, Callable],
    after: tuple[Any, Callable],
    batches: Sequence[Any],
    *,
    evaluate: Evaluate | None = None,
    repeats: int = 30,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> BeforeAndAfter:
    """Measure a large network and a smaller one beside each other.

    Both are compiled for each batch and run three times. They are then timed in turn, waiting for every run, with
    all arrays already on the device.

    Args:
        before, after: `(params, apply_fn)`, as in `jaxeff.analyze`: `(variables, model.apply)`, or the result of
            `jaxeff.functional`.
        batches: a list with a batch for each size to time: `[x[:1], x[:32]]`. A tuple as a batch holds several
            positional inputs.
        evaluate: `(params, apply_fn) -> score`, such as the accuracy on held-out data; or a dict of scores.
        repeats: number of timed runs of each network on each batch.
        rngs, **apply_kwargs: passed to both.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or a network does not accept a batch.

    >>> model = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    >>> large, small = ({"a": jnp.ones((3, n)), "b": jnp.ones((n, 2))} for n in (8, 4))
    >>> found = before_and_after((large, model), (small, model), [jnp.ones((16, 3))], repeats=5)
    >>> found.before.macs, found.after.macs
    ((640,), (320,))
    """
    _check_batches(batches)
    if repeats < 1:
        raise ValueError(f"`repeats` must be 1 or more, got {repeats}")
    networks = {"before": before, "after": after}
    bound: dict[str, list[Bound]] = {}
    for name, network in networks.items():
        params, apply_fn = _checked_network(name, network)
        bound[name] = [bind(params, apply_fn, batch, rngs, apply_kwargs) for batch in batches]
        _check_fit(name, bound[name])
    scores = {name: {} if evaluate is None else _scores(evaluate(*networks[name])) for name in networks}
    timed = [
        latencies({"before": _call(large), "after": _call(small)}, repeats=repeats)
        for large, small in zip(bound["before"], bound["after"], strict=True)
    ]
    measured = (
        MeasuredNetwork(
            _parameters(each[0]), _bytes(each[0]), scores[name], tuple(run[name] for run in timed)
        )
        for name, each in bound.items()
    )
    sizes = tuple(each.batch_size for each in bound["before"])
    return BeforeAndAfter(*measured, batch_sizes=sizes, device=_device(bound["before"][0]))


def _check_batches(batches: Any) -> None:
    if not isinstance(batches, list) or not batches:
        raise TypeError(
            "`batches` must be a list, of a batch for each size to time, such as [x[:1], x[:32]]; got "
            f"{'an empty list' if isinstance(batches, list) else type(batches).__name__}"
        )


def _checked_network(name: str, network: Any) -> tuple[Any, Callable]:
    if not isinstance(network, tuple) or len(network) != 2:
        got = f"a tuple of {len(network)}" if isinstance(network, tuple) else type(network).__name__
        raise TypeError(f"`{name}` must be a pair (params, apply_fn), got {got}")
    params, apply_fn = network
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise TypeError(f"`{name}` holds shapes without numbers: timing needs arrays")
    return params, apply_fn


def _check_fit(name: str, bound: Sequence[Bound]) -> None:
    """Check that the network accepts all batches, before anything that takes long."""
    for each in bound:
        try:
            _ = jax.eval_shape(each.plain, each.params, each.inputs)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error


def _scores(found: Any) -> dict[str, float]:
    scores = found if isinstance(found, Mapping) else {"score": found}
    if wrong := [name for name, value in scores.items() if jnp.ndim(value)]:
        shape = jnp.shape(scores[wrong[0]])
        raise ValueError(f"`evaluate` must return numbers, got an array of shape {shape} for {wrong[0]!r}")
    return {name: float(value) for name, value in scores.items()}


def _call(bound: Bound) -> tuple[Callable, tuple[Any, Any]]:
    return bound.plain, (bound.params, bound.inputs)


def _parameters(bound: Bound) -> int:
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(bound.params))


def _bytes(bound: Bound) -> int:
    inputs = zip(jax.tree.leaves(bound.inputs), bound.origins, strict=True)
    state = [leaf for leaf, origin in inputs if origin == "constant"]
    return sum(jnp.asarray(leaf).nbytes for leaf in [*jax.tree.leaves(bound.params), *state])


def _device(bound: Bound) -> str:
    first = jax.device_put(jax.tree.leaves(bound.params)[0])
    return next(iter(first.devices())).device_kind


def _render(found: BeforeAndAfter) -> str:
    """Render counts and scores, then multiply-accumulates and time for each batch."""
    before, after = found.before, found.after
    rows = [("", "before", "after", "before / after")]
    rows += [_counted(name, getattr(before, name), getattr(after, name)) for name in ("parameters", "bytes")]
    for name, score in before.scores.items():
        other = after.scores.get(name, math.nan)
        rows.append((name, f"{score:.4g}", f"{other:.4g}", f"{other - score:+.3g}"))
    each = zip(found.batch_sizes, before.latencies, after.latencies, found.speedups, strict=True)
    for size, one, other, ratios in each:
        batch = "one batch" if size is None else f"batch of {size}"
        rows.append(_counted(f"MACs, {batch}", one.cost.macs, other.cost.macs))
        rows.append((f"time, {batch}", _timed(one), _timed(other), _ranged(ratios)))
        rows.append(("  compiling it", _compiling(one), _compiling(other), ""))
    runs = len(before.latencies[0].seconds)
    notes = [
        f"Times: median (10th to 90th percentile) of {runs} runs on {found.device}, "
        "the two networks in turn; beside them the ratios of neighboring runs. Of scores, the difference.",
    ]
    if not all(latency.cost.complete for latency in (*before.latencies, *after.latencies)):
        notes.append("Not all work is in the MACs: see `cost.statements` of the latencies.")
    wrapped = [line for note in notes for line in text.wrapped(note, text.WIDTH)]
    return "\n".join([*text.aligned(rows, gap=2), "", *wrapped])


def _counted(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, text.number(before), text.number(after), f"{before / after:.2f}x" if after else "?"


def _timed(found: Latency) -> str:
    """Return the percentiles in the unit of the median."""
    median = duration(found.median)
    scale = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}[median.split()[1]]
    low, high = scale * found.percentile_10, scale * found.percentile_90
    return f"{median} ({_three_digits(low)} to {_three_digits(high)})"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _compiling(found: Latency) -> str:
    return duration(found.compiled.lower_seconds + found.compiled.compile_seconds)


def _ranged(ratios: Ratios) -> str:
    return f"{ratios.median:.2f}x ({ratios.percentile_10:.2f} to {ratios.percentile_90:.2f})"
