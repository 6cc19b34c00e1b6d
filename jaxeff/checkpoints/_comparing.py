"""Comparison of two checkpoints, array by array."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from jaxeff.checkpoints import _measuring as measuring
from jaxeff.checkpoints import _reading as reading
from jaxeff.checkpoints._counting import counts_of
from jaxeff.checkpoints._measuring import SORTED, MeasuredWeight
from jaxeff.checkpoints._opening import Checkpoint, open_checkpoint
from jaxeff.checkpoints._reading import Progress, pieces
from jaxeff.checkpoints._stored import Stored
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.output.stacks import Stack, explained, rows_of
from jaxeff.report._serialization import encoded

_SORTED = {
    "change": "Sorted by change, the largest first.",
    "size": "Sorted by size, the largest first.",
    "path": "In the order of A.",
}
ORDERS = tuple(_SORTED)


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """One weight in both checkpoints. Unknown numbers are nan.

    Attributes:
        utilization: in A and in B.
        gini: in A and in B.
        change: ||a - b|| / ||a||; infinite if only a is 0.
    """

    path: str
    shape: tuple[int, ...]
    utilization: tuple[float, float]
    gini: tuple[float, float]
    change: float


@dataclasses.dataclass(frozen=True)
class OtherChange:
    """One array that is not a weight, in both checkpoints; nan if it could not be read."""

    path: str
    shape: tuple[int, ...]
    change: float


@dataclasses.dataclass(frozen=True, repr=False)
class CheckpointComparison(Shown):
    """Changes from checkpoint A to B. `str(comparison)` is a table of 100 columns, the largest change first.

    Attributes:
        weights: weights in both, of equal shape.
        others: other arrays in both, of equal shape.
        only_a, only_b: names in only one checkpoint.
        reshaped: arrays in both, of different shapes: name, shape in A, shape in B.
    """

    weights: tuple[WeightChange, ...]
    others: tuple[OtherChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __str__(self) -> str:
        return render(self)

    def table(self, pattern: str = "*", *, blocks: bool = False) -> str:
        """Return the table, as `print(comparison)` shows it, or the part of it that is of interest.

        In a table of more than 20 weights, at least three that differ only in the number of their block share a row:
        the lowest and the highest number, and the change over depth. So do more than 20 names below the table.

        Args:
            pattern: of the paths of the weights to show, such as "*mlp*"; * stands for any text, ? for one character.
                The text below the rows covers all arrays.
            blocks: whether each block has a row of its own.

        Raises:
            TypeError: the pattern is not a string.
            ValueError: no weight matches the pattern.
        """
        return render(self, pattern=pattern, blocks=blocks)

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the fields as JSON, with nan as null and infinity as the string "Infinity"."""
        return json.dumps(encoded(self), allow_nan=False, indent=indent)


def compare_checkpoints(
    a: str | os.PathLike, b: str | os.PathLike, *, progress: bool = True
) -> CheckpointComparison:
    """Compare checkpoint `a` with checkpoint `b`, array by array.

    Arrays are matched by name, and read as by `analyze_checkpoint`; dtypes may differ.

    Args:
        a, b: paths of checkpoints, as in `analyze_checkpoint`; their formats may differ.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        CheckpointError: a format is unknown, or a checkpoint is damaged.
        OSError: a checkpoint cannot be read.

    >>> import flax.serialization, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = [pathlib.Path(folder) / name for name in ("a", "b")]
    ...     for path, value in zip(paths, (1.0, 1.5)):
    ...         tree = {"kernel": np.full((3, 4), value, np.float32)}
    ...         _ = path.write_bytes(flax.serialization.to_bytes(tree))
    ...     found = compare_checkpoints(*paths, progress=False)
    >>> found.weights[0].change
    0.5
    """
    return compare(open_checkpoint(a), open_checkpoint(b), progress=progress)


def compare(a: Checkpoint, b: Checkpoint, *, progress: bool = True) -> CheckpointComparison:
    """Compare two checkpoints that `open_checkpoint` opened."""
    both = [name for name in a.arrays if name in b.arrays]
    alike = {name for name in both if a.arrays[name].shape == b.arrays[name].shape}
    total = sum(checkpoint.arrays[name].nbytes for checkpoint in (a, b) for name in alike)
    pairs = [(a.arrays[name], b.arrays[name]) for name in both if name in alike]
    weights = [pair for pair in pairs if pair[0].role == pair[1].role == "weight"]
    others = [pair for pair in pairs if not pair[0].role == pair[1].role == "weight"]
    with reading.progress_bar("Comparing weights", total, progress) as advance:
        weight_changes = _weight_changes(weights, advance)
        other_changes = [_other_change(*pair, advance) for pair in others]
    return CheckpointComparison(
        tuple(weight_changes),
        tuple(other_changes),
        tuple(name for name in a.arrays if name not in b.arrays),
        tuple(name for name in b.arrays if name not in a.arrays),
        tuple((name, a.arrays[name].shape, b.arrays[name].shape) for name in both if name not in alike),
    )


def _weight_changes(pairs: Sequence[tuple[Stored, Stored]], progress: Progress) -> list[WeightChange]:
    if not pairs:
        return []
    found: dict[int, tuple[MeasuredWeight, MeasuredWeight, float]] = {}

    def small() -> Iterator[tuple[Hashable, int, tuple[int, np.ndarray, np.ndarray]]]:
        for index, pair in enumerate(pairs):
            if pair[0].size > SORTED:
                found[index] = _measured(*pair, progress)
            else:
                key = pair[0].size, pair[0].dtype, pair[1].dtype
                one, two = (reading.whole(stored, progress) for stored in pair)
                yield key, pair[0].size, (index, one, two)

    for group in reading.batches(small()):
        indices, *sides = zip(*group, strict=True)
        one, two = map(np.stack, sides)
        distance = _Distance(len(indices))
        distance.add(one, two)
        measured = [measuring.measured_rows(measuring.magnitudes(side)) for side in (one, two)]
        found.update(zip(indices, zip(*measured, distance.relative(), strict=True), strict=True))
    ones, twos, changes = zip(*(found[index] for index in range(len(pairs))), strict=True)
    first, second = measuring.metrics_of_all(ones), measuring.metrics_of_all(twos)
    utilization, gini = (
        zip(getattr(first, name).tolist(), getattr(second, name).tolist(), strict=True)
        for name in ("utilization", "gini")
    )
    names, shapes = ([getattr(stored, name) for stored, _ in pairs] for name in ("name", "shape"))
    return list(map(WeightChange, names, shapes, utilization, gini, changes))


def _measured(a: Stored, b: Stored, progress: Progress) -> tuple[MeasuredWeight, MeasuredWeight, float]:
    """Measure a large weight, reading both checkpoints piece by piece."""
    assert a.dtype is not None and b.dtype is not None
    counts, distance = (counts_of(a.dtype), counts_of(b.dtype)), _Distance()
    for one, two in zip(pieces(a, progress), pieces(b, progress), strict=True):
        for side, piece in zip(counts, (one, two), strict=True):
            side.add(piece.elements)
        distance.add(one.elements[None], two.elements[None])
    first, second = (measuring.measured(side.result()) for side in counts)
    return first, second, distance.relative()[0]


def _other_change(a: Stored, b: Stored, progress: Progress) -> OtherChange:
    if a.dtype is None or b.dtype is None:
        progress(a.nbytes + b.nbytes)
        return OtherChange(a.name, a.shape, math.nan)
    distance = _Distance()
    for pair in zip(pieces(a, progress), pieces(b, progress), strict=True):
        distance.add(*(piece.elements[None] for piece in pair))
    return OtherChange(a.name, a.shape, distance.relative()[0])


class _Distance:
    """Accumulates ||a - b|| / ||a|| of several arrays, in float64, from their pieces."""

    def __init__(self, arrays: int = 1) -> None:
        self.apart, self.all = np.zeros(arrays), np.zeros(arrays)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add pieces [arrays, n]."""
        wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
        x, y = a.astype(wide), b.astype(wide)
        with np.errstate(invalid="ignore"):
            self.apart += _squares(np.subtract(x, y, out=y))
        self.all += _squares(x)

    def relative(self) -> list[float]:
        return list(map(_relative, self.apart.tolist(), self.all.tolist()))


def _squares(x: np.ndarray) -> np.ndarray:
    # BLAS is not used, as its threads wait for each other longer than they multiply.
    parts = (np.real(x), np.imag(x)) if x.dtype.kind == "c" else (x,)
    return np.sum([np.einsum("ij,ij->i", part, part) for part in parts], axis=0)


def _relative(apart: float, all_: float) -> float:
    if not all_:
        return math.inf if apart else 0.0
    return math.sqrt(apart / all_) if math.isfinite(all_) else math.nan


def render(
    comparison: CheckpointComparison,
    order: str = "change",
    top: int | None = None,
    width: int = text.WIDTH,
    *,
    pattern: str = "*",
    blocks: bool = False,
) -> str:
    """Render the table in an order of ORDERS, and say in which.

    Lists show their first `top` entries, and how many were left out. `pattern` and `blocks` are as in
    `CheckpointComparison.table`.

    Raises:
        ValueError: no weight matches the pattern.
    """
    weights = in_order(comparison.weights, order)
    shown = [weights[index] for index in text.matching([weight.path for weight in weights], pattern)]
    reshaped = [(name, f" {list(one)} -> {list(two)}") for name, one, two in comparison.reshaped]
    only_a, only_b = ([(name, "") for name in names] for names in (comparison.only_a, comparison.only_b))
    return "\n".join(
        [
            *_table(shown, top, width, blocks),
            "",
            *text.wrapped(
                f"{_SORTED[order]} {_summary(comparison)}" if weights else _summary(comparison), width
            ),
            *_listed("Only in A:", only_a, top, width, blocks),
            *_listed("Only in B:", only_b, top, width, blocks),
            *_listed("Of another shape:", reshaped, top, width, blocks),
        ]
    )


def _listed(
    title: str, entries: Sequence[tuple[str, str]], top: int | None, width: int, blocks: bool
) -> list[str]:
    """Return the section of some names, each with what follows it; blocks whose names are alike share an entry."""
    if not entries:
        return []
    shown = rows_of(entries, blocks)[:top]
    names = [f"{stack.part(range(len(stack.members)))}{entries[stack.members[0]][1]}" for stack in shown]
    lines = text.section(width, title, names) or ["", title]
    return [*lines, *text.left_out(len(entries), sum(len(stack.members) for stack in shown), "names")]


def in_order(weights: Sequence[WeightChange], order: str) -> list[WeightChange]:
    """Return the weights with the largest change first and unknown ones before them; 'path' keeps their order."""
    if order == "path":
        return list(weights)
    if order == "size":
        return sorted(weights, key=lambda weight: -math.prod(weight.shape))
    return sorted(weights, key=lambda weight: (not math.isnan(weight.change), -weight.change))


_HEADER = ("layer", "shape", "util. A", "util. B", "gini A", "gini B", "change", "depth")
_DISPENSABLE = ("gini A", "gini B", "shape")
_LEFT = ("shape", "depth")


def _table(weights: Sequence[WeightChange], top: int | None, width: int, blocks: bool) -> list[str]:
    if not weights:
        return text.wrapped("No weight has one name and one shape in both.", width)
    # Unknown changes do not hide in the range of the others.
    alike = [(weight.path, (weight.shape, math.isnan(weight.change))) for weight in weights]
    kept = rows_of(alike, blocks)[:top]
    cells = [_cells(stack, [weights[index] for index in stack.members]) for stack in kept]
    legend = explained(
        kept, "the lowest and the highest number, and the change over depth", "comparison.table(blocks=True)"
    )
    return [
        *(text.aligned([_HEADER, *cells], width, dispensable=_DISPENSABLE, left=_LEFT) if cells else []),
        *text.left_out(len(weights), sum(len(stack.members) for stack in kept), "weights"),
        *(line for each in legend for line in text.wrapped(each, width)),
    ]


def _cells(stack: Stack, weights: Sequence[WeightChange]) -> tuple[str, ...]:
    changes = [weight.change for weight in weights]
    return (
        stack.part(range(len(weights))),
        "x".join(map(str, weights[0].shape)),
        *(
            text.ranged(side, text.percent)
            for side in zip(*(weight.utilization for weight in weights), strict=True)
        ),
        *(text.ranged(side, text.decimal) for side in zip(*(weight.gini for weight in weights), strict=True)),
        text.ranged(changes, _change),
        text.sparkline(changes) if len(weights) > 1 else text.UNKNOWN,
    )


def _change(value: float) -> str:
    return "?" if math.isnan(value) else "inf" if math.isinf(value) else "0" if not value else f"{value:.2e}"


def _summary(comparison: CheckpointComparison) -> str:
    changed = [other for other in comparison.others if other.change != 0]
    same = sum(weight.change == 0 for weight in comparison.weights)
    others = len(comparison.others)
    text = (
        f"Change is ||a - b|| / ||a||. {len(comparison.weights)} weights in both, {same} of them equal; "
        f"{others} other arrays in both, {others - len(changed)} of them equal"
    )
    if known := [other for other in changed if not math.isnan(other.change)]:
        most = max(known, key=lambda other: other.change)
        text += f", at most {_change(most.change)} apart ({most.path})"
    if unknown := len(changed) - len(known):
        text += f", {unknown} of them not known"
    return f"{text}."
