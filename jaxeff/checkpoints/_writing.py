"""Checkpoints in the form of the Hugging Face hub: written whole or not at all."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxeff.checkpoints import _config as config_sizes
from jaxeff.checkpoints import _reading as reading
from jaxeff.checkpoints import _safetensors as safetensors
from jaxeff.checkpoints._opening import open_checkpoint
from jaxeff.checkpoints._stored import CheckpointError, Stored, quoted
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.output.stacks import folded_cells

EXCLUDED = ("*embed*", "*lm_head*", "*wte*", "*wpe*", "*shared*", "*classifier*", "*pooler*")
"""Names of arrays that are left whole unless told otherwise: embeddings, and heads that read the last block."""


class Zeroed(NamedTuple):
    """How many weights of one array were set to 0."""

    name: str
    shape: tuple[int, ...]
    zeros: int


@dataclasses.dataclass(frozen=True, repr=False)
class PrunedCheckpoint(Shown):
    """What `prune_checkpoint` wrote. `str()` is a table.

    Attributes:
        path: of the new checkpoint.
        zeroed: of each pruned array.
        total: all elements of the checkpoint.
    """

    path: Path
    zeroed: tuple[Zeroed, ...]
    total: int

    @property
    def zeros(self) -> int:
        return sum(each.zeros for each in self.zeroed)

    def __str__(self) -> str:
        rows = [
            (each.name, "x".join(map(str, each.shape)), f"{each.zeros / np.prod(each.shape):.1%}")
            for each in self.zeroed
        ]
        width = text.terminal_width()
        head = (
            f"{quoted(self.path)}: {self.zeros:,} of {self.total:,} elements zeroed by magnitude. Nothing was "
            "retrained, and zeros make no model faster."
        )
        rows = folded_cells(rows)
        table = text.aligned([("array", "shape", "zeroed"), *rows[:_SHOWN]], width)
        return "\n".join(
            [
                *table,
                *text.left_out(len(rows), min(len(rows), _SHOWN), "rows"),
                "",
                *text.wrapped(head, width),
            ]
        )


_SHOWN = 40


def prune_checkpoint(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    sparsity: float,
    exclude: Sequence[str] = EXCLUDED,
    progress: bool = True,
) -> PrunedCheckpoint:
    """Copy a safetensors checkpoint with the smallest weights of each array set to 0.

    In each weight the round(sparsity * size) elements of least magnitude become 0; of equal ones, those that come
    first. All other bytes, and the other files of a directory, are copied as they are.

    Args:
        path: a .safetensors file, or a directory with one, or with shards and their index.
        output: the new file or directory, which must not exist.
        sparsity: fraction of each array to remove, in [0, 1).
        exclude: patterns of names (`fnmatch`) that stay whole.
        progress: show a progress bar if stderr is a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged or not in safetensors, has no weights to prune, or one holds nan.
        ValueError: the sparsity is not in [0, 1).
        FileExistsError: the output exists.
        OSError: a file cannot be read or written.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     before, after = (pathlib.Path(folder) / name for name in ("a.safetensors", "b.safetensors"))
    ...     write_checkpoint(before, {"w": np.array([[3.0, -1.0], [2.0, -4.0]], np.float32)})
    ...     prune_checkpoint(before, after, sparsity=0.5, progress=False).zeros
    2
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), the fraction to remove, got {sparsity}")
    checkpoint = open_checkpoint(path)
    arrays = [*checkpoint.arrays.values(), *(each for rest in checkpoint.left_out.values() for each in rest)]
    if any(array.place is None for array in arrays):
        raise CheckpointError(
            f"{quoted(path)} is not in safetensors: prune its params with `jaxeff.prune.masks`"
        )
    chosen = [
        array
        for name, array in checkpoint.arrays.items()
        if array.role == "weight" and not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise CheckpointError(f"{quoted(path)} has no weights besides those excluded: {', '.join(exclude)}")
    with _new(Path(output)) as copy:
        source = Path(path)
        if source.is_dir():
            _ = shutil.copytree(source, copy)
        else:
            # An index stands for the directory that it is in.
            if not source.name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{quoted(path)} is one file of a checkpoint: pass the directory that holds it"
                )
            _ = shutil.copyfile(source, copy)
        total = sum(array.nbytes for array in chosen)
        with reading.progress_bar("Pruning weights", total, progress) as advance:
            zeroed = [
                _prune(array, copy if copy.is_file() else copy / Path(_file(array)).name, sparsity, advance)
                for array in chosen
            ]
    return PrunedCheckpoint(Path(output), tuple(zeroed), sum(array.size for array in arrays))


def _file(array: Stored) -> str:
    assert array.place is not None
    return array.place[0]


def _prune(array: Stored, file: Path, sparsity: float, progress: reading.Progress) -> Zeroed:
    """Zero an array's smallest elements where they lie in the copied file."""
    assert array.place is not None
    with array.open() as read:
        elements = read(0, array.size)
    magnitudes = np.abs(reading.narrowed(elements).astype(np.float32))
    if np.isnan(magnitudes).any():
        raise CheckpointError(f"{quoted(array.name)} holds nan: which weights are smallest is unknown")
    count = round(sparsity * array.size)
    # The smallest, and of equal ones the first, without sorting all.
    if count:
        last = np.partition(magnitudes, count - 1)[count - 1]
        gone = magnitudes < last
        ties = np.flatnonzero(magnitudes == last)
        gone[ties[: count - int(gone.sum())]] = True
        elements[gone] = 0
    with open(file, "r+b") as target:
        _ = target.seek(array.place[1])
        _ = target.write(elements.view(np.uint8).data)
    progress(array.nbytes)
    return Zeroed(array.name, array.shape, count)


def write_checkpoint(
    output: str | os.PathLike,
    arrays: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays as a safetensors file or, with a config, as a directory in the form of the Hugging Face hub.

    In a directory, the blocks that are left are numbered from 0, and the config gets the sizes of the arrays.

    Args:
        output: a file, or with `config` a directory, which must not exist.
        arrays: by the names of the checkpoint, units first, as `open_checkpoint` gives them.
        config: the model's `config.json` as it was. Number of blocks, hidden units and heads are replaced, for the
            names of Llama, Mistral, Qwen, Gemma, BERT and ViT; everything else stays.
        metadata: text to keep in the file.

    Raises:
        CheckpointError: the arrays' blocks differ in a size, for which a config has one number.
        TypeError: safetensors has no such dtype.
        FileExistsError: the output exists.
        OSError: a file cannot be written.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = {"num_hidden_layers": 2, "intermediate_size": 8}
    ...     arrays = {"model.layers.1.mlp.up_proj.weight": np.ones((6, 4), np.float32)}
    ...     write_checkpoint(pathlib.Path(folder) / "small", arrays, config=config)
    ...     print((pathlib.Path(folder) / "small" / "config.json").read_text())
    {
     "num_hidden_layers": 1,
     "intermediate_size": 6
    }
    """
    named = {name: np.asarray(array) for name, array in arrays.items()}
    if config is not None:
        named = config_sizes.renumbered(named)
        config = config_sizes.resized(config, {name: array.shape for name, array in named.items()})
    with _new(Path(output)) as target:
        file = target
        if config is not None:
            target.mkdir()
            _ = (target / "config.json").write_text(json.dumps(config, indent=1))
            file = target / "model.safetensors"
        with open(file, "wb") as opened:
            safetensors.write(opened, named, metadata or {"format": "pt"})


@contextmanager
def _new(output: Path) -> Iterator[Path]:
    """Yield a path beside a file or directory to write, which is moved there when it is complete.

    Raises:
        FileExistsError: it exists.
    """
    if output.exists():
        raise FileExistsError(f"{quoted(output)} exists: pass a path that does not")
    beside = output.with_name(f".{output.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        os.rename(beside, output)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
