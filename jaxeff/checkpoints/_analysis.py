"""A checkpoint -> the report of its magnitudes."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxeff.checkpoints import _measuring as measuring
from jaxeff.checkpoints import _reading as reading
from jaxeff.checkpoints._measuring import SORTED, MeasuredWeight, Units
from jaxeff.checkpoints._opening import Checkpoint, open_checkpoint
from jaxeff.checkpoints._reading import Progress
from jaxeff.checkpoints._stored import Stored
from jaxeff.metrics import _half_normal as half_normal
from jaxeff.metrics._curve import unpacked
from jaxeff.report import LayerNumbers, LayerStructure, OtherNumbers, OtherStructure, Report, none_of
from jaxeff.report import _totals as totals


def analyze_checkpoint(path: str | os.PathLike, *, curves: bool = False, progress: bool = True) -> Report:
    """Which weights of a checkpoint hold its magnitude, without the code of its model.

    Reads one array at a time and a piece of it at a time, so that a checkpoint larger than the memory can be
    analysed. A weight is a floating array of two axes or more that is not called bias or scale; its numbers
    are those of `jaxeff.analyze(params)` to 2e-5.

    Args:
        path: of a .safetensors file, a directory of shards with their index, an Orbax checkpoint, or a Flax
            .msgpack file.
        curves: whether to count how the magnitudes of each weight are spread, as `jaxeff.analyze` has it.
        progress: whether to show a bar on a terminal.

    Returns:
        One row for every weight, by name; every other array is counted as what it is. Of variables or a
        train state, the `params` alone: `open_checkpoint(path).left_out` tells the rest.

    Raises:
        CheckpointError: it is of no format that is read here, or damaged.
        OSError: it cannot be read.

    >>> import flax.serialization, pathlib, tempfile
    >>> params = {"kernel": np.ones((3, 4), np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model.msgpack"
    ...     _ = path.write_bytes(flax.serialization.to_bytes({"params": params}))
    ...     report = analyze_checkpoint(path, progress=False)
    >>> float(report["kernel"].metrics.utilization)
    1.0
    """
    return analyze(open_checkpoint(path), curves=curves, progress=progress)


def analyze(checkpoint: Checkpoint, *, curves: bool = False, progress: bool = True) -> Report:
    """The same of a checkpoint that `open_checkpoint` opened."""
    arrays = checkpoint.arrays.values()
    weights = [array for array in arrays if array.role == "weight"]
    others = [array for array in arrays if array.role != "weight"]
    total = sum(array.nbytes for array in arrays)
    with reading.progress_bar("Reading weights", total, progress) as advance:
        measured, units = _measured(
            weights, [checkpoint.unit_axis(array) for array in weights], advance, curves
        )
        other_numbers = [measuring.measure_other(array, advance) for array in others]
    structure = tuple(_structure(array, checkpoint.unit_axis(array)) for array in weights)
    numbers = _numbers(measured, units)
    return Report(
        criterion="magnitude",
        structure=structure,
        other_structure=tuple(OtherStructure(array.name, array.role, array.shape) for array in others),
        numbers=numbers,
        units=tuple(found.sums for found in units),
        activities=(None,) * len(weights),
        other_numbers=_stacked(other_numbers) if others else none_of(OtherNumbers),
        modules=(),
        attentions=(),
        model=totals.model(structure, numbers, sum(array.size for array in arrays)),
    )


def _measured(
    weights: Sequence[Stored], axes: Sequence[int], progress: Progress, curves: bool
) -> tuple[list[MeasuredWeight], list[Units]]:
    found: dict[int, tuple[MeasuredWeight, Units]] = {}

    def small() -> Iterator[tuple[Hashable, int, tuple[int, np.ndarray]]]:
        for index, (weight, axis) in enumerate(zip(weights, axes, strict=True)):
            if weight.size > SORTED:
                found[index] = measuring.measure(weight, axis, progress, curves)
            else:
                yield (weight.shape, weight.dtype), weight.size, (index, reading.whole(weight, progress))

    for group in reading.batches(small()):
        indices, arrays = zip(*group, strict=True)
        first, rows = indices[0], measuring.magnitudes(np.stack(arrays))
        units = measuring.units_of_rows(rows, weights[first].shape, axes[first])
        found.update(
            zip(indices, zip(measuring.measured_rows(rows, curves), units, strict=True), strict=True)
        )
    in_order = [found[index] for index in range(len(weights))]
    return [measured for measured, _ in in_order], [units for _, units in in_order]


def _structure(stored: Stored, unit_axis: int) -> LayerStructure:
    return LayerStructure(
        path=stored.name,
        kind="weight",
        shape=stored.shape,
        dtype=str(stored.dtype),
        nonlinearity=None,
        scored="magnitude",
        reason=None,
        uses=0,
        unit_axes=(unit_axis,),
        macs=None,
    )


def _numbers(measured: Sequence[MeasuredWeight], units: Sequence[Units]) -> LayerNumbers:
    if not measured:
        return none_of(LayerNumbers)
    metrics = measuring.metrics_of_all(measured)
    effective: Any = np.asarray([each.effective for each in units], np.float32)
    largest: Any = np.asarray([each.largest for each in units])
    finite: Any = np.ones(len(measured), bool)
    cells = [each.cells for each in measured if each.cells is not None]
    return LayerNumbers(
        metrics=metrics,
        null=jax.tree.map(lambda value: np.full(len(measured), value), half_normal.null_of_magnitude()),
        effective_units=effective,
        effective_fan_in=metrics.effective_params / np.where(effective > 0, effective, np.float32(1)),
        nonfinite_weights=metrics.nonfinite,
        largest_weight=largest,
        evidence_finite=finite,
        distribution=unpacked(np.stack(cells).astype(np.float32)) if cells else None,
    )


def _stacked(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *numbers: np.stack(numbers, axis=-1), *parts)
