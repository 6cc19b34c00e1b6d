"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def write(path: str | os.PathLike, text: str) -> None:
    """Write a whole file or nothing: an existing file stays until the new one is complete.

    Raises:
        OSError: it cannot be written.
    """
    # Follow a link rather than replace it.
    target = Path(os.path.realpath(path))
    with _named(path):
        if _is_special(target):
            # A device or a pipe cannot be replaced as a whole.
            _ = target.write_text(text)
            return
        with _beside(target) as (beside, file):
            _ = file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, target)


def check_writable(path: str | os.PathLike) -> None:
    """Fail early if `write` would fail later.

    Raises:
        OSError: the directory is missing or not writable, or the path is a directory.
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
    """Make a new file in the target's directory, which is deleted afterwards unless it was moved."""
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "x", encoding="utf-8") as file:
            yield beside, file
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Report errors with this path; a failed write names none, and the temporary file's name means nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
