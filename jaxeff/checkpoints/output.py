"""A report of a checkpoint as text and as a file. Imports `table`, `report`."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from jaxeff import table
from jaxeff.checkpoints.opening import Checkpoint, natural
from jaxeff.exact import Metrics
from jaxeff.records import LayerReport
from jaxeff.report import Report

# Of what tells of weights to spare the largest first, of what tells of weights in use the smallest.
_USED = (
    *("utilization", "effective_params", "entropy", "normalized_entropy", "mean", "std", "max"),
    *("coverage_50", "coverage_80", "coverage_90"),
)
_SPARE = tuple(field.name for field in dataclasses.fields(Metrics) if field.name not in (*_USED, "size"))
ORDERS = ("path", "size", *_USED, *_SPARE)


def render(report: Report, checkpoint: Checkpoint, order: str = "path", top: int | None = None) -> str:
    """The report's table in an order of ORDERS, with the first `top` rows, and what was left out.

    The model, the notes and the recommendations are of all rows.
    """
    return "\n".join([table.render(report, in_order(report, order)[:top]), *_left_out(checkpoint)])


def in_order(report: Report, order: str) -> list[int]:
    """The rows' numbers; a row whose number is not known comes last."""
    rows = report.single().rows
    return sorted(range(len(rows)), key=lambda index: _key(order)(rows[index]))


def _key(order: str) -> Callable[[LayerReport], tuple]:
    if order == "path":
        return lambda row: (natural(row.path),)
    if order == "size":
        return lambda row: (-row.size,)

    def by_number(row: LayerReport) -> tuple:
        value = float(getattr(row.metrics, order))
        return math.isnan(value), value if order in _USED else -value

    return by_number


def _left_out(checkpoint: Checkpoint) -> list[str]:
    parts = [
        f"{name} ({len(arrays):,} arrays, {sum(array.size for array in arrays):,} elements)"
        for name, arrays in checkpoint.left_out.items()
    ]
    return ["", f"Beside `params`, and not analysed: {', '.join(parts)}."] if parts else []


def write(path: str | os.PathLike, text: str) -> None:
    """Writes all of a file or nothing: what was there before stays until the new file is whole.

    Raises:
        OSError: it cannot be written.
    """
    # A link is followed, not replaced.
    target = Path(os.path.realpath(path))
    with _named(path):
        if _is_special(target):
            # A device or a pipe has no whole.
            _ = target.write_text(text)
            return
        with _beside(target) as (beside, file):
            _ = file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, target)


def check_writable(path: str | os.PathLike) -> None:
    """Fails now where `write` would fail after all has been read.

    Raises:
        OSError: the directory is missing or may not be written, or the path is a directory.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _named(path):
        if not _is_special(target):
            with _beside(target):
                pass


def _is_special(target: Path) -> bool:
    return target.exists() and not stat.S_ISREG(target.stat().st_mode)


@contextmanager
def _beside(target: Path) -> Iterator[tuple[Path, TextIO]]:
    """A new file in the target's directory, which is gone afterwards unless it was moved."""
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "x", encoding="utf-8") as file:
            yield beside, file
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Errors are told of this path: a write that fails names none, the file beside it means nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
