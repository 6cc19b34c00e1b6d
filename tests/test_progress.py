"""Bars on standard error: on one line, in color on a terminal, and nowhere else."""

import io
import re
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import cli, demo
from jaxeff.demo import _demo
from jaxeff.output import progress
from jaxeff.output.progress import Pace, bytes_bar, progress_bar

COLOR = re.compile(r"\x1b\[[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """What a program that asks takes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def _shown(monkeypatch, stderr, bar=lambda: progress_bar("Calibrating", 12, True), step=()):
    monkeypatch.setattr(sys, "stderr", stderr)
    with bar() as advance:
        advance(*step)
    return stderr.getvalue()


BARS = {
    "steps": (lambda: progress_bar("Calibrating", 100_000, True), ()),
    "without an end": (lambda: progress_bar("Calibrating", None, True), ()),
    "bytes": (lambda: bytes_bar("Comparing weights", 724 * 10**6, True), (10**8,)),
    "the demo": (lambda: _demo._shown_progress("Training", 20), (demo.Epoch(1, 2.345, 1.0),)),
}


@pytest.mark.parametrize("width", [40, 80, 150])
@pytest.mark.parametrize(("bar", "step"), BARS.values(), ids=BARS)
def test_a_bar_stays_on_one_line(bar, step, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    printed = _shown(monkeypatch, Terminal(), bar, step)
    # The last frame alone ends its line.
    assert printed.count("\n") == 1
    frames = [frame.rstrip() for frame in ESCAPE.sub("", printed).splitlines() if frame.strip()]
    assert frames and all(len(frame) <= width for frame in frames)
    # Nothing is cut either, and where there is room nothing is missing.
    assert not any("…" in frame for frame in frames)
    assert width == 40 or all(re.search(r"[0-9-]:[0-9-]{2}", frame) for frame in frames)


def test_a_terminal_has_color_unless_no_color_is_set(monkeypatch):
    assert COLOR.search(_shown(monkeypatch, Terminal()))
    monkeypatch.setenv("NO_COLOR", "1")
    printed = _shown(monkeypatch, Terminal())
    assert "Calibrating" in printed and not COLOR.search(printed)


@pytest.mark.parametrize("no_color", [False, True])
def test_the_command_line_keeps_its_output_plain(no_color, tmp_path, capsys, monkeypatch):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    path = tmp_path / "model.msgpack"
    _ = path.write_bytes(flax.serialization.to_bytes({"kernel": np.eye(4, dtype=np.float32)}))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["analyze", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "Reading weights" in terminal.getvalue()
    assert bool(COLOR.search(terminal.getvalue())) != no_color


def test_what_is_no_terminal_has_no_bar(monkeypatch):
    assert _shown(monkeypatch, io.StringIO()) == ""
    assert _shown(monkeypatch, Terminal(), lambda: progress_bar("Calibrating", 12, False)) == ""


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets them pass for every bar."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(progress, "Pace", lambda: Pace(lambda: now[0]))
    return wait


def _frames(stderr):
    return [frame for frame in re.split(r"[\r\n]", ESCAPE.sub("", stderr.getvalue())) if frame.strip()]


def _compile():
    """A program of its own, which is compiled or read from a cache."""
    _ = jax.jit(lambda x: x + 1)(jnp.zeros(3))


def test_what_is_left_is_told_from_steps_that_compiled_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bytes_bar("Reading", 1000, True) as advance:
        for seconds in (90, 40):
            _compile()
            _ = clock(seconds)
            advance(100)
        drawn = _frames(terminal)
        _ = clock(2)
        advance(100)
    # 200 bytes in 130 seconds tell nothing.
    assert not any(re.search(r"\d:\d\d", frame) for frame in drawn)
    # 100 bytes in the 2 seconds of the third step, and 700 are left.
    assert re.search(r"0:00:14", _frames(terminal)[-1])


def test_a_pace_is_that_of_all_steps_that_compiled_nothing(clock):
    pace = progress.Pace()
    _ = clock(50)
    pace.compiled = True
    pace.advance(1)
    assert pace.remaining(10) is None
    _ = clock(3)
    pace.advance(1)
    assert pace.remaining(10) == 30
    _ = clock(600)
    pace.compiled = True
    pace.advance(5)
    assert pace.remaining(5) == 15
    _ = clock(1)
    pace.advance(1)
    # 2 steps in 4 seconds.
    assert pace.remaining(4) == 8


def test_no_time_is_told_from_less_than_a_second_of_steps(clock):
    pace = progress.Pace()
    # One byte in a millisecond would make 11 days of a gigabyte.
    _ = clock(0.001)
    pace.advance(1)
    assert pace.remaining(10**9) is None
    _ = clock(1.999)
    pace.advance(2 * 10**8 - 1)
    assert pace.remaining(10**9) == pytest.approx(10)
    assert progress.Pace().remaining(1) is None


def test_hours_are_told_as_hours(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bytes_bar("Reading", 10**6, True) as advance:
        _ = clock(60)
        advance(555)
    # 999,445 bytes at 9.25 a second: 108,048.1 seconds.
    assert "30:00:49" in _frames(terminal)[-1]


def test_a_finished_bar_has_nothing_left(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bytes_bar("Reading", 10, True) as advance:
        advance(10)
    assert "0:00:00" in _frames(terminal)[-1]
