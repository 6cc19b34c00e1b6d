"""The Orbax format: a directory with a tree of names, and one tensorstore array for each.

The tree is read from Orbax's file, since Orbax itself would open all arrays at once, and report a missing one in
several lines. Arrays are read by tensorstore, as many rows at a time as are stored together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxeff.checkpoints._stored import CheckpointError, Read, Stored, quoted

_TREE = "_METADATA"
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")
_AT_ONCE = 1 << 24  # bytes of rows to read together if few are stored together
_MOST = 1 << 36  # maximum bytes of rows to read together


def is_item(directory: Path) -> bool:
    """Return whether the directory itself holds a tree of arrays."""
    return (directory / _TREE).is_file()


def items(directory: Path) -> list[Path]:
    """Return the subdirectories that hold trees: 'default', 'params', 'state' ..."""
    return sorted(child for child in directory.iterdir() if child.is_dir() and is_item(child))


def steps(directory: Path) -> list[Path]:
    """Return the subdirectories that hold such items: the steps of a training run."""
    return sorted(child for child in directory.iterdir() if child.is_dir() and items(child))


def list_tree(directory: Path) -> dict[tuple[str, ...], Stored]:
    """List the arrays by their keys.

    Raises:
        CheckpointError: the directory is not a checkpoint, or is damaged.
        OSError: the directory cannot be read.
    """
    try:
        tree = json.loads((directory / _TREE).read_bytes())
        leaves = dict(map(_leaf, tree["tree_metadata"].values()))
        is_whole = tree.get("store_array_data_equal_to_fill_value") is True
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        # JSON can spell names that UTF-8, and so a file system, cannot.
        _ = "".join(name for keys in leaves for name in keys).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{quoted(directory)} has no tree of Orbax in its {_TREE} ({_first_line(error)})"
        ) from error
    # If zeros are stored too, missing data is damage, which would otherwise read as zeros.
    spec = {"driver": driver, "fill_missing_data_reads": not is_whole}
    return {keys: _stored(directory, spec, keys, kind) for keys, kind in leaves.items() if kind not in _EMPTY}


def _leaf(entry: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the keys of one leaf, and Orbax's name of its type."""
    return tuple(str(key["key"]) for key in entry["key_metadata"]), str(entry["value_metadata"]["value_type"])


def _stored(directory: Path, spec: dict[str, Any], keys: tuple[str, ...], kind: str) -> Stored:
    name = "/".join(keys)
    if kind not in _ARRAYS:
        # A string, or an object of the program's own.
        return Stored(name, (), None, kind, _nothing)
    array, where = _array(directory, spec, ".".join(keys)), f"{quoted(directory)}: array {quoted(name)}"

    @contextmanager
    def opened() -> Iterator[Read]:
        yield _Rows(array, where).read

    dtype = np.dtype(array.dtype.numpy_dtype)
    return Stored(name, tuple(array.shape), dtype, str(dtype), opened)


@contextmanager
def _nothing() -> Iterator[Read]:
    yield lambda start, stop: np.empty(0, np.uint8)


def _array(directory: Path, spec: dict[str, Any], name: str) -> Any:
    import tensorstore

    place = directory.absolute()
    inside = os.path.normpath(place / name)
    if not inside.startswith(f"{place}{os.sep}"):
        raise CheckpointError(f"{quoted(directory)} names the array {quoted(name)}, which is not in it")
    if (place / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{inside}/"}
    try:
        return tensorstore.open({**spec, "kvstore": store}, open=True, read=True).result()
    except ValueError as error:
        raise CheckpointError(
            f"{quoted(directory)}: array {quoted(name)} is missing or damaged ({_first_line(error)})"
        ) from error


class _Rows:
    """Reads in C order, and keeps the rows that tensorstore had to read together."""

    def __init__(self, array: Any, where: str) -> None:
        self.array, self.where, self.dtype = array, where, array.dtype.numpy_dtype
        shape, chunk = array.shape, array.chunk_layout.read_chunk.shape
        self.row = math.prod(shape[1:])
        together = max(chunk[0], 1) if shape else 1
        nbytes = self.row * together * self.dtype.itemsize
        if nbytes > _MOST:
            raise CheckpointError(f"{where} has to be read {nbytes:,} bytes at a time, which is too many")
        self.step = together * max(_AT_ONCE // max(nbytes, 1), 1)
        self.first, self.kept = 0, np.empty(0, self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        found, done = np.empty(stop - start, self.dtype), 0
        while done < found.size:
            at = start + done
            if not self.first <= at < self.first + self.kept.size:
                self._load(at // self.row // self.step * self.step)
            part = self.kept[at - self.first : stop - self.first]
            # Copied, so that no piece keeps all rows in memory.
            found[done : done + part.size] = part
            done += part.size
        return found

    def _load(self, row: int) -> None:
        self.kept = np.empty(0, self.dtype)
        shape = self.array.shape
        rows = self.array[row : min(row + self.step, shape[0])] if shape else self.array
        try:
            self.kept = np.ascontiguousarray(rows.read().result()).reshape(-1)
        except ValueError as error:
            raise CheckpointError(f"{self.where} is damaged ({_first_line(error)})") from error
        self.first = row * self.row


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].split(" [", 1)[0][:200]
