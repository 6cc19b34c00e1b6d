"""Opening of checkpoints of any format: a path -> names and shapes of its arrays."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxeff.checkpoints import _msgpack as msgpack
from jaxeff.checkpoints import _orbax as orbax
from jaxeff.checkpoints import _safetensors as safetensors
from jaxeff.checkpoints._shards import INDEX, list_shards
from jaxeff.checkpoints._stored import CheckpointError, Stored, printable, quoted

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
Keys = tuple[str, ...]
_FORMATS = (
    "a .safetensors file, a Flax .msgpack file, a directory of shards of either with their index (such as "
    "*.safetensors.index.json), or an Orbax checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint, unread.

    Attributes:
        path: of the checkpoint.
        arrays: of the model, by name; numbers in names are in numerical order.
        units_first: whether units are the first axis of a weight, as in PyTorch, or the last.
        left_out: contents other than the model's parameters ('opt_state', 'step', ...), and their arrays.
    """

    path: Path
    arrays: dict[str, Stored]
    units_first: bool
    left_out: dict[str, tuple[Stored, ...]]

    def unit_axis(self, array: Stored) -> int:
        """Return the axis of a weight that indexes its units."""
        return 0 if self.units_first else len(array.shape) - 1


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint, reading names and shapes but no array.

    Raises:
        CheckpointError: the format is unknown, or the checkpoint is damaged.
        OSError: the checkpoint cannot be read.
    """
    path = Path(path)
    # Check first that the file exists, before its suffix is looked at.
    if not stat.S_ISDIR(mode := path.stat().st_mode) and not stat.S_ISREG(mode):
        # Reading a pipe would block.
        raise CheckpointError(f"{quoted(path)} is neither a file nor a directory")
    return _of_directory(path) if path.is_dir() else _of_file(path)


def _of_file(path: Path) -> Checkpoint:
    for kind in FILE_FORMATS:
        if path.name.endswith(kind.index_suffix):
            return kind.checkpoint(path, list_shards(path, kind.list_arrays))
    for kind in FILE_FORMATS:
        if path.suffix == kind.suffix:
            return kind.checkpoint(path, kind.list_arrays(path))
    with open(path, "rb") as file:
        start = file.read(2)
    if path.suffix.lower() in _PICKLES or _is_pickle(start):
        raise CheckpointError(_pickled(path))
    for kind in FILE_FORMATS:
        if kind.begins(start):
            return kind.checkpoint(path, kind.list_arrays(path))
    raise CheckpointError(f"{quoted(path)} is not a checkpoint that jaxeff reads: pass {_FORMATS}")


def _is_pickle(start: bytes) -> bool:
    """Recognize a pickle by its protocol, or by the zip archive in which PyTorch wraps one."""
    return start == b"PK" or (len(start) == 2 and start[0] == 0x80 and start[1] <= 5)


def _pickled(path: Path) -> str:
    return (
        f"{quoted(path)} is a pickle, which can run any code when loaded, so jaxeff does not load it. If "
        "you trust it, convert it with safetensors.torch.save_file(torch.load(path, weights_only=True), "
        "'model.safetensors')"
    )


def _of_directory(path: Path) -> Checkpoint:
    names = sorted(child.name for child in path.iterdir())
    for kind in FILE_FORMATS:
        if indices := [name for name in names if name.endswith(kind.index_suffix)]:
            return _of_file(path / _only(path, indices, "indices of shards"))
        if any(name.endswith(kind.suffix) for name in names):
            # A whole file of one format is preferred to shards of the next.
            break
    if orbax.is_item(path):
        return _of_tree(path, orbax.list_tree(path))
    if items := [item.name for item in orbax.items(path)]:
        return _of_tree(path, orbax.list_tree(path / _item(path, items)))
    if steps := [step.name for step in orbax.steps(path)]:
        raise CheckpointError(
            f"{quoted(path)} holds the checkpoints {', '.join(_in_order(steps))}: pass one, such as "
            f"{quoted(path / _in_order(steps)[-1])}"
        )
    for kind in FILE_FORMATS:
        if files := [name for name in names if name.endswith(kind.suffix)]:
            return _of_file(path / _only(path, files, f"{kind.suffix} files and no index"))
    if pickles := [name for name in names if Path(name).suffix.lower() in _PICKLES]:
        raise CheckpointError(_pickled(path / pickles[0]))
    raise CheckpointError(f"{quoted(path)} holds no checkpoint that jaxeff reads: pass {_FORMATS}")


def _only(path: Path, names: list[str], what: str) -> str:
    if len(names) > 1:
        raise CheckpointError(
            f"{quoted(path)} has {len(names)} {what}: pass one, such as {quoted(path / names[0])}"
        )
    return names[0]


def _item(path: Path, items: list[str]) -> str:
    """Return the item that holds the model, by the names that Orbax and its users give it."""
    usual = [name for name in ("params", "default", "state") if name in items]
    return usual[0] if usual else _only(path, items, "items")


def _of_names(path: Path, arrays: Mapping[Keys, Stored]) -> Checkpoint:
    """Open arrays without a tree, whose names Flax and PyTorch join."""
    separator = "/" if any("/" in array.name for array in arrays.values()) else "."
    named = {tuple(array.name.split(separator, 1)): array for array in arrays.values()}
    return _checkpoint(path, named, separator, not safetensors.is_flax(arrays.values()))


def _of_tree(path: Path, tree: Mapping[Keys, Stored]) -> Checkpoint:
    # A boxed parameter (nn.Partitioned, nnx.Param) is stored as a map of `value` alone.
    inside = Counter(keys[:depth] for keys in tree for depth in range(1, len(keys)))
    unboxed = {
        keys[:-1] if keys[-1:] == ("value",) and inside[keys[:-1]] == 1 else keys: array
        for keys, array in tree.items()
    }
    return _checkpoint(path, unboxed, "/", units_first=False)


def _checkpoint(path: Path, tree: Mapping[Keys, Stored], separator: str, units_first: bool) -> Checkpoint:
    """Keep only the parameters of variables or a train state, as `jaxeff.analyze` does."""
    has_params = any(len(keys) > 1 and keys[0] == "params" for keys in tree)
    arrays: dict[str, Stored] = {}
    left_out: dict[str, tuple[Stored, ...]] = {}
    for keys, array in tree.items():
        if has_params and (keys[0] != "params" or len(keys) == 1):
            left_out[printable(keys[0])] = (*left_out.get(printable(keys[0]), ()), array)
            continue
        name = printable(separator.join(keys[1:] if has_params else keys))
        if name in arrays:
            raise CheckpointError(f"{quoted(path)} has two arrays with the name {quoted(name)}")
        arrays[name] = dataclasses.replace(array, name=name)
    if not arrays:
        raise CheckpointError(f"{quoted(path)} holds no arrays")
    return Checkpoint(path, {name: arrays[name] for name in _in_order(list(arrays))}, units_first, left_out)


class FileFormat(NamedTuple):
    """A file format. Shards of a checkpoint have an index beside them.

    Attributes:
        suffix: of its files.
        list_arrays: lists the arrays of one file by their keys, unread.
        checkpoint: makes a checkpoint of the arrays of a file, or of all shards.
        begins: recognizes a file of another suffix, by its first two bytes.
    """

    suffix: str
    list_arrays: Callable[[Path], Mapping[Keys, Stored]]
    checkpoint: Callable[[Path, Mapping[Keys, Stored]], Checkpoint]
    begins: Callable[[bytes], bool]

    @property
    def index_suffix(self) -> str:
        return f"{self.suffix}{INDEX}"


FILE_FORMATS = (
    FileFormat(".safetensors", safetensors.list_named, _of_names, lambda start: False),
    FileFormat(".msgpack", msgpack.list_tree, _of_tree, msgpack.begins),
)
"""The file formats. If a directory holds several, the first is read."""


def _in_order(names: list[str]) -> list[str]:
    """Sort names, with 'layers.2' before 'layers.10'."""
    return sorted(names, key=natural)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key to sort by that reads the numbers in a name as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    # Longer runs of digits are not numbers, and Python refuses to read the longest.
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() and len(part) < 20 else (1, 0, part)
        for part in parts
    ]
