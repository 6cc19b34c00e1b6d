"""Flax's msgpack format: a tree of maps whose leaves are arrays, each a shape, a dtype and bytes.

`flax.serialization.msgpack_restore` reads a whole file into memory. This module walks over the file and remembers
where each array lies. Nothing in the format can hold code.

References:
    https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jaxeff.checkpoints._stored import (
    CheckpointError,
    Read,
    Span,
    Stored,
    checked_shape,
    dtype_named,
    in_file,
    quoted,
)

_ARRAY, _SCALAR = 1, 3  # as flax.serialization numbers its extensions
_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST = 200
_MOST = 10_000_000  # values; the tree of a file with more would take too much memory


class _Array(NamedTuple):
    shape: tuple[int, ...]
    kind: str
    spans: tuple[Span, ...]  # in bytes


class _Bytes(NamedTuple):
    offset: int
    size: int


class _Extension(NamedTuple):
    code: int
    offset: int
    size: int


def list_tree(path: str | os.PathLike) -> dict[tuple[str, ...], Stored]:
    """List the arrays by their keys; plain numbers are arrays without axes.

    Raises:
        CheckpointError: the file is not a Flax msgpack file, or is cut off.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{quoted(path)} is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = _whole(data, path)
    return {keys: _stored(keys, leaf, path) for keys, leaf in _leaves((), tree)}


def begins(start: bytes) -> bool:
    """Return whether a file that begins with these bytes may be msgpack: a map."""
    return bool(start) and (start[0] & 0xF0 == 0x80 or start[0] in (0xDE, 0xDF))


def _whole(data: mmap.mmap, path: str | os.PathLike) -> dict[str, Any]:
    scanner = _Scanner(data, 0, len(data))
    try:
        tree = scanner.value(0)
    except _Malformed as error:
        raise CheckpointError(f"{quoted(path)} is not a Flax msgpack file, or is cut off: {error}") from None
    if not isinstance(tree, dict) or scanner.at != len(data):
        raise CheckpointError(f"{quoted(path)} is not a Flax msgpack file: it does not hold one map")
    return tree


def _leaves(keys: tuple[str, ...], node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, list):
        node = {str(index): child for index, child in enumerate(node)}
    if not isinstance(node, dict) or _CHUNKED in node:
        if node is not None:
            yield keys, node
        return
    for key, child in node.items():
        yield from _leaves((*keys, key), child)


def _stored(keys: tuple[str, ...], leaf: Any, path: str | os.PathLike) -> Stored:
    name, where = "/".join(keys), f"{quoted(path)}: array {quoted('/'.join(keys))}"
    if isinstance(leaf, dict):
        leaf = _joined(leaf, where)
    if isinstance(leaf, (int, float)):
        return _constant(name, leaf)
    if not isinstance(leaf, _Array):
        kind = "bytes" if isinstance(leaf, (_Bytes, _Extension)) else type(leaf).__name__
        return Stored(name, (), None, kind, in_file(path, (), np.dtype(np.uint8)))
    dtype, found = dtype_named(leaf.kind), sum(span.size for span in leaf.spans)
    if dtype is None:
        return Stored(name, leaf.shape, None, leaf.kind, in_file(path, (), np.dtype(np.uint8)))
    if found != math.prod(leaf.shape) * dtype.itemsize or any(
        span.size % dtype.itemsize for span in leaf.spans
    ):
        raise CheckpointError(f"{where} has {found:,} bytes, which {list(leaf.shape)} of {leaf.kind} has not")
    spans = [Span(span.offset, span.size // dtype.itemsize) for span in leaf.spans]
    return Stored(name, leaf.shape, dtype, leaf.kind, in_file(path, spans, dtype))


def _constant(name: str, number: float) -> Stored:
    array = np.asarray(number)

    @contextmanager
    def opened() -> Iterator[Read]:
        yield lambda start, stop: array.reshape(1)[start:stop]

    return Stored(name, (), array.dtype, str(array.dtype), opened)


def _joined(node: dict[str, Any], where: str) -> _Array:
    """Return the array that Flax split into chunks of 2^30 bytes."""
    shape, chunks = (_in_order(node.get(key)) for key in ("shape", "chunks"))
    if shape is None or not chunks or not all(isinstance(chunk, _Array) for chunk in chunks):
        raise CheckpointError(f"{where} is in chunks, some of which are missing")
    if len({chunk.kind for chunk in chunks}) > 1:
        raise CheckpointError(f"{where} is in chunks of several dtypes")
    spans = tuple(span for chunk in chunks for span in chunk.spans)
    return _Array(checked_shape(shape, where), chunks[0].kind, spans)


def _in_order(node: Any) -> list[Any] | None:
    """Return {'0': a, '1': b} as [a, b]."""
    if not isinstance(node, dict) or any(str(index) not in node for index in range(len(node))):
        return None
    return [node[str(index)] for index in range(len(node))]


class _Malformed(Exception):
    pass


class _Scanner:
    """Reads msgpack values one after the other, but only the location of bytes."""

    def __init__(self, data: mmap.mmap, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop
        self.values = 0

    def value(self, depth: int) -> Any:
        self.values += 1
        if depth > _DEEPEST or self.values > _MOST:
            raise _Malformed(f"it is nested {depth} deep, or has more than {_MOST:,} values")
        code = self.number(">B")
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        for first, last, read in (
            (0x80, 0x8F, self.map),
            (0x90, 0x9F, self.list),
            (0xA0, 0xBF, lambda size, _: self.text(size)),
        ):
            if first <= code <= last:
                return read(code - first, depth)
        if code not in _KINDS:
            raise _Malformed(f"byte {self.at - 1:,} begins no value")
        return _KINDS[code](self, depth)

    def number(self, layout: str) -> Any:
        start = self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)[0]

    def skip(self, size: int) -> int:
        """Skip the next bytes and return where they begin."""
        start = self.at
        if size > self.stop - start:
            raise _Malformed(f"{size:,} bytes should follow byte {start:,}, and {self.stop - start:,} do")
        self.at = start + size
        return start

    def text(self, size: int) -> str:
        start = self.skip(size)
        return bytes(self.data[start : self.at]).decode("utf-8", "backslashreplace")

    def raw(self, size: int) -> _Bytes:
        return _Bytes(self.skip(size), size)

    def list(self, size: int, depth: int) -> list[Any]:
        self._check_count(size)
        return [self.value(depth + 1) for _ in range(size)]

    def map(self, size: int, depth: int) -> dict[str, Any]:
        self._check_count(2 * size)
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)):
                raise _Malformed(f"a key before byte {self.at:,} is not text")
            if str(key) in found:
                raise _Malformed(f"the key {quoted(key)} comes twice in one map")
            found[str(key)] = self.value(depth + 1)
        return found

    def _check_count(self, size: int) -> None:
        # Each value takes at least one byte, so no length can claim more memory than the file has.
        if size > self.stop - self.at:
            raise _Malformed(f"{size:,} values should follow byte {self.at:,}")

    def extension(self, size: int, depth: int) -> Any:
        code, start = self.number(">b"), self.skip(size)
        if code not in (_ARRAY, _SCALAR):
            return _Extension(code, start, size)
        fields = _Scanner(self.data, start, self.at).list_of_array(depth)
        return _Array(*fields)

    def list_of_array(self, depth: int) -> tuple[tuple[int, ...], str, tuple[Span, ...]]:
        """Read the contents of an array's extension: [shape, dtype, bytes]."""
        start, fields = self.at, self.value(depth + 1)
        if not (isinstance(fields, list) and len(fields) == 3 and isinstance(fields[2], _Bytes)):
            raise _Malformed(f"no shape, dtype and bytes at byte {start:,}")
        try:
            shape = checked_shape(fields[0], f"the array at byte {start:,}")
        except CheckpointError as error:
            raise _Malformed(str(error)) from None
        return shape, str(fields[1]), (Span(fields[2].offset, fields[2].size),)


def _sized(layout: str, read: Callable[[_Scanner, int, int], Any]) -> Callable[[_Scanner, int], Any]:
    return lambda scanner, depth: read(scanner, scanner.number(layout), depth)


def _kinds() -> dict[int, Callable[[_Scanner, int], Any]]:
    """Return what follows each first byte that does not itself hold the value or its length."""
    lengths, kinds = (">B", ">H", ">I"), {}
    for first, layouts, read in (
        (0xC4, lengths, lambda scanner, size, depth: scanner.raw(size)),
        (0xC7, lengths, _Scanner.extension),
        (0xD9, lengths, lambda scanner, size, depth: scanner.text(size)),
        (0xDC, lengths[1:], _Scanner.list),
        (0xDE, lengths[1:], _Scanner.map),
    ):
        kinds.update({first + index: _sized(layout, read) for index, layout in enumerate(layouts)})
    for first, layouts in ((0xCA, ">f >d >B >H >I >Q >b >h >i >q".split()),):
        kinds.update(
            {
                first + index: lambda scanner, depth, layout=layout: scanner.number(layout)
                for index, layout in enumerate(layouts)
            }
        )
    for index in range(5):
        kinds[0xD4 + index] = lambda scanner, depth, size=1 << index: scanner.extension(size, depth)
    constants = {0xC0: None, 0xC2: False, 0xC3: True}
    kinds.update({code: lambda scanner, depth, value=value: value for code, value in constants.items()})
    return kinds


_KINDS = _kinds()
