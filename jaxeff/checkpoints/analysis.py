"""A checkpoint -> the report of its magnitudes. Imports `opening`, `measuring`, `records`, `report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxeff import importance, null, totals
from jaxeff.checkpoints import interruption, measuring
from jaxeff.checkpoints.measuring import Measured, Progress
from jaxeff.checkpoints.opening import Checkpoint, open_checkpoint
from jaxeff.checkpoints.stored import Stored
from jaxeff.metrics import Distribution
from jaxeff.progress import bytes_bar
from jaxeff.records import LayerNumbers, LayerStructure, OtherNumbers, OtherStructure, none_of
from jaxeff.report import Report


def analyze_checkpoint(path: str | os.PathLike, *, curves: bool = False, progress: bool = True) -> Report:
    """Which weights of a checkpoint hold its magnitude, without the code of its model.

    Reads one array at a time and a piece of it at a time, so that a checkpoint larger than the memory can be
    analysed. A weight is a floating array of two axes or more that is not called bias or scale; its numbers
    are those of `jaxeff.analyze(params)` to 1e-5.

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
    with interruption.held() as hear:
        return _analyze(checkpoint, curves, progress, hear)


def _analyze(checkpoint: Checkpoint, curves: bool, progress: bool, hear: Callable[[], None]) -> Report:
    arrays = checkpoint.arrays.values()
    weights = [array for array in arrays if array.role == "weight"]
    others = [array for array in arrays if array.role != "weight"]
    total = sum(array.nbytes for array in arrays)
    with bytes_bar("Reading weights", total, progress) as show:

        def advance(count: int) -> None:
            show(count)
            hear()

        measured = [measure(array, checkpoint.unit_axis(array), advance, curves) for array in weights]
        other_numbers = [measuring.measure_other(array, advance) for array in others]
    structure = tuple(_structure(array, checkpoint.unit_axis(array)) for array in weights)
    numbers = _numbers(structure, measured)
    return Report(
        criterion="magnitude",
        structure=structure,
        other_structure=tuple(OtherStructure(array.name, array.role, array.shape) for array in others),
        numbers=numbers,
        units=tuple(found.units for found in measured),
        activities=(None,) * len(weights),
        other_numbers=_stacked(other_numbers) if others else none_of(OtherNumbers),
        modules=(),
        attentions=(),
        model=totals.model(structure, numbers, sum(array.size for array in arrays)),
    )


def measure(stored: Stored, unit_axis: int, progress: Progress, curves: bool = False) -> Measured:
    """What one weight's magnitudes are reduced to, in one pass over it, seldom two."""
    with measuring.Measuring(stored, unit_axis) as weight:
        for piece in measuring.pieces(stored, progress):
            weight.add(piece)
        return weight.found(curves)


def _structure(stored: Stored, unit_axis: int) -> LayerStructure:
    return LayerStructure(
        path=stored.name,
        kind="weight",
        shape=stored.shape,
        dtype=str(stored.dtype),
        nonlinearity=None,
        scored=importance.named("magnitude").side,
        reason=None,
        uses=0,
        unit_axes=(unit_axis,),
        macs=None,
    )


def _numbers(structure: Sequence[LayerStructure], measured: Sequence[Measured]) -> LayerNumbers:
    if not measured:
        return none_of(LayerNumbers)
    return _stacked([_layer(found) for found in measured])


def _layer(found: Measured) -> LayerNumbers:
    effective, units = found.metrics.effective_params, found.effective_units
    return LayerNumbers(
        metrics=found.metrics,
        null=null.of_magnitude(),
        effective_units=units,
        effective_fan_in=effective / (units if units > 0 else np.float32(1)),
        nonfinite_weights=found.metrics.nonfinite,
        largest_weight=found.largest,
        evidence_finite=np.asarray(True),
        distribution=None if found.cells is None else Distribution(*found.cells.T.astype(np.float32)),
    )


def _stacked(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *numbers: np.stack(numbers, axis=-1), *parts)
