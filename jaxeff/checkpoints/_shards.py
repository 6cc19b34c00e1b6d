"""Checkpoints in several files, with a JSON index that says which file holds which array.

Only the index and the names in each file are read. The index has the form that Hugging Face writes, for
safetensors and for Flax's msgpack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from jaxeff.checkpoints._stored import CheckpointError, Stored, json_object, quoted

INDEX = ".index.json"
_LONGEST_INDEX = 1 << 30
Key = TypeVar("Key")


def list_shards(index: Path, list_file: Callable[[Path], Mapping[Key, Stored]]) -> dict[Key, Stored]:
    """List the arrays of all shards that an index names.

    Args:
        index: path of the index.
        list_file: lists the arrays of one shard.

    Raises:
        CheckpointError: the index or a shard does not follow the format, a shard is missing or outside the
            directory, or an array is missing or in two shards.
        OSError: a file cannot be read.
    """
    if index.stat().st_size > _LONGEST_INDEX:
        raise CheckpointError(f"{quoted(index)} is too long for an index")
    shard_of = json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{quoted(index)} has no weight_map from arrays to files")
    arrays: dict[Key, Stored] = {}
    found: dict[str, str] = {}
    for shard in sorted(set(shard_of.values())):
        for key, array in list_file(_beside(index, shard)).items():
            if array.name in found:
                raise CheckpointError(
                    f"{quoted(index)}: array {quoted(array.name)} is in two shards, "
                    f"{quoted(found[array.name])} and {quoted(shard)}"
                )
            arrays[key], found[array.name] = array, shard
    _check_map(index, shard_of, found)
    return arrays


def _beside(index: Path, shard: str) -> Path:
    """Return the path of a shard, which must be a plain name, so that an index cannot point at any other file."""
    if (
        shard in ("", ".", "..")
        or "/" in shard
        or "\\" in shard
        or "\0" in shard
        or Path(shard).is_absolute()
    ):
        raise CheckpointError(f"{quoted(index)} names the shard {quoted(shard)}, which is not beside it")
    # By the names there are, since asking for one that is too long is an error of the system.
    if not any(child.name == shard and child.is_file() for child in index.parent.iterdir()):
        raise CheckpointError(f"{quoted(index)} names the shard {quoted(shard)}, which is missing")
    return index.parent / shard


def _check_map(index: Path, shard_of: dict[str, str], found: dict[str, str]) -> None:
    for name, shard in shard_of.items():
        if found.get(name) != shard:
            raise CheckpointError(
                f"{quoted(index)}: array {quoted(name)} should be in {quoted(shard)}, and is "
                + (f"in {quoted(found[name])}" if name in found else "not there")
            )
