"""One array of a checkpoint: its name, its contents, and how to read a part of it.

Every format is a function from a path to these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxeff.model.roles import role_of

Read = Callable[[int, int], np.ndarray]  # elements from, to, in C order -> [to - from]

LARGEST = 2**63 - 1  # what a length may be
_RANK = 64  # as NumPy's
_DTYPES = frozenset(
    [
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    ]
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says which one and why, in one line."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a checkpoint, of which only the name and shape have been read.

    Attributes:
        name: in the checkpoint.
        shape: [...]
        dtype: None if it is not a known kind of number.
        kind: the checkpoint's name for its dtype.
        open: context manager that yields `read(start, stop)`, which returns elements in C order. Data read in
            sequence is read only once.
        place: the file that holds it and the byte where it begins, if it lies in one piece as it is in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    kind: str
    open: Callable[[], AbstractContextManager[Read]]
    place: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes to read."""
        return 0 if self.dtype is None else self.size * self.dtype.itemsize

    @property
    def role(self) -> str:
        """'weight' or another role, as in `jaxeff.analyze` without a model."""
        if self.dtype is None:
            return f"{printable(self.kind)[:40]} (not read)"
        return role_of(self.name, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive elements in a file."""

    offset: int
    size: int


def in_file(path: str | os.PathLike, spans: Sequence[Span], dtype: np.dtype) -> Callable:
    """Return `Stored.open` for an array that consists of these spans of a file."""

    @contextmanager
    def opened() -> Iterator[Read]:
        with open(path, "rb", buffering=0) as file:
            yield lambda start, stop: _read_spans(file, spans, dtype, start, stop)

    return opened


def _read_spans(file: FileIO, spans: Sequence[Span], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    found, begin = np.empty(stop - start, dtype), 0
    for span in spans:
        first, last = max(start, begin), min(stop, begin + span.size)
        if first < last:
            part = found[first - start : last - start]
            _ = file.seek(span.offset + (first - begin) * dtype.itemsize)
            fill(file, part.view(np.uint8).data)
        begin += span.size
    return found


def fill(file: FileIO, buffer: memoryview) -> None:
    """Read until the buffer is full."""
    done = 0
    while done < len(buffer):
        # A system call may return at most this much.
        count = file.readinto(buffer[done : done + (1 << 30)])
        if not count:
            raise CheckpointError(
                f"{quoted(file.name)} ended while it was read: was it written to meanwhile?"
            )
        done += count


def checked_shape(shape: object, where: str) -> tuple[int, ...]:
    """Return the shape if it is valid."""
    if not isinstance(shape, (list, tuple)) or len(shape) > _RANK:
        raise CheckpointError(f"{where} has no shape, a list of up to {_RANK} lengths")
    if not all(type(length) is int and 0 <= length <= LARGEST for length in shape):
        raise CheckpointError(f"{where} has a shape of something else than lengths")
    return tuple(shape)


def dtype_named(name: str) -> np.dtype | None:
    """Return the dtype of a name, if it is a supported kind of number."""
    # Only known names, because NumPy parses some strings as Python.
    return jnp.dtype(name) if name in _DTYPES else None


def json_object(text: bytes, path: str | os.PathLike) -> dict[str, Any]:
    """Parse a JSON object without duplicate names.

    Raises:
        CheckpointError: the text is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{quoted(path)} has the name {quoted(twice)} twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{quoted(path)}: invalid JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{quoted(path)}: JSON, but not an object")
    return found


def first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:120]


def quoted(name: object) -> str:
    """Return a name for a message, on one line and of limited length.

    >>> quoted("a\\nb")
    "'a\\\\nb'"
    """
    text = repr(os.fspath(name)) if isinstance(name, os.PathLike) else repr(name)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def printable(name: str) -> str:
    """Return the name with characters that would move or color a terminal's cursor written as escapes.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name
    )
