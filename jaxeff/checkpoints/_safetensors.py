"""The safetensors format: the length of a JSON header, the header, and the arrays one after the other.

Only the header of a file is read. By the rules of the format, the arrays fill the file without overlap or gap.

References:
    https://github.com/huggingface/safetensors, "Format"
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxeff.checkpoints._stored import (
    LARGEST,
    CheckpointError,
    Span,
    Stored,
    checked_shape,
    fill,
    in_file,
    json_object,
    quoted,
)

_LONGEST_HEADER = 100_000_000  # the limit of the format's own reader
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def list_file(path: str | os.PathLike) -> list[Stored]:
    """List the arrays of one file, in the order in which they lie.

    Raises:
        CheckpointError: the file does not follow the format.
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        length, size = bytearray(8), os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(
                f"{quoted(path)} is cut off: a safetensors file has at least 8 bytes, this one {size}"
            )
        fill(file, memoryview(length))
        header_size = int.from_bytes(length, "little")
        if header_size > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{quoted(path)} is not a safetensors file, or is cut off: its header has {header_size:,} bytes, "
                f"the file {size:,}"
            )
        header = bytearray(header_size)
        fill(file, memoryview(header))
    return parse(bytes(header), size, path)


def list_named(path: str | os.PathLike) -> dict[tuple[str, ...], Stored]:
    """List the arrays of one file by name."""
    return {(array.name,): array for array in list_file(path)}


def parse(header: bytes, size: int, path: str | os.PathLike) -> list[Stored]:
    """List the arrays of a header.

    Args:
        header: JSON, without the 8 bytes before it.
        size: of the whole file, in bytes.
        path: of the file.

    Raises:
        CheckpointError: the header does not follow the format, or the file does not match the header.

    >>> header = b'{"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}'
    >>> [(array.name, array.shape) for array in parse(header, 8 + len(header) + 24, "model.safetensors")]
    [('w', (2, 3))]
    """
    entries = {name: entry for name, entry in json_object(header, path).items() if name != "__metadata__"}
    begin = 8 + len(header)
    placed = sorted(
        (_placed(name, entry, path) for name, entry in entries.items()), key=lambda item: item[:2]
    )
    end = 0
    for first, last, name in ((first, last, item) for first, last, item, _ in placed):
        if first != end:
            what = "overlaps the array before it" if first < end else "leaves a gap before it"
            raise CheckpointError(f"{quoted(path)}: array {quoted(name)} {what}")
        end = last
    if begin + end != size:
        what = "is cut off" if begin + end > size else "has unused bytes at its end"
        raise CheckpointError(
            f"{quoted(path)} {what}: its header describes {begin + end:,} bytes, it has {size:,}"
        )
    return [_stored(name, entry, begin + first, last - first, path) for first, last, name, entry in placed]


def _placed(name: str, entry: Any, path: str | os.PathLike) -> tuple[int, int, str, dict[str, Any]]:
    where = f"{quoted(path)}: array {quoted(name)}"
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and isinstance(entry.get("dtype"), str)):
        raise CheckpointError(f"{where} has no dtype and data_offsets")
    if (
        not all(type(offset) is int and 0 <= offset <= LARGEST for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(f"{where} has the data_offsets {quoted(offsets)}")
    return (*offsets, name, entry)


def _stored(name: str, entry: dict[str, Any], begin: int, length: int, path: str | os.PathLike) -> Stored:
    where = f"{quoted(path)}: array {quoted(name)}"
    shape, kind = checked_shape(entry.get("shape"), where), entry["dtype"]
    dtype = jnp.dtype(_DTYPES[kind]) if kind in _DTYPES else None
    size = math.prod(shape)
    if dtype is not None and length != (right := size * dtype.itemsize):
        raise CheckpointError(
            f"{where} has {length:,} bytes, where {quoted(list(shape))} of {kind} has {right:,}"
        )
    if size > 8 * length:
        raise CheckpointError(f"{where} has {size:,} elements of {kind} in {length:,} bytes")
    spans = [Span(begin, size)]
    opened = in_file(path, spans, dtype or np.dtype(np.uint8))
    return Stored(name, shape, dtype, kind, opened, (os.fspath(path), begin))


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays in the order of their names.

    Raises:
        TypeError: an array is of a dtype that the format does not have.
    """
    kinds = {name: kind for kind, name in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        if array.dtype.name not in kinds:
            raise TypeError(f"`arrays` has {name!r} of {array.dtype}, which safetensors cannot hold")
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    # Aligned, as the format's own writer does it.
    text += b" " * (-len(text) % 8)
    _ = file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        _ = file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def is_flax(arrays: Iterable[Stored]) -> bool:
    """Return whether the names are Flax's; units are then the last axis, and the first in PyTorch."""
    return any(array.name.replace("/", ".").rsplit(".", 1)[-1] == "kernel" for array in arrays)
