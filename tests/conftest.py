"""What every test runs under, and the fixtures shared between them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Most of the suite's time is compiling. Workers, the processes that tests start and later runs share what was
# compiled, in a directory that no other user can write to, since what is found there is run.
_CACHE = Path(tempfile.gettempdir()) / f"jaxeff-tests-{os.getuid()}"
_CACHE.mkdir(mode=0o700, exist_ok=True)
if _CACHE.stat().st_uid != os.getuid() or _CACHE.stat().st_mode & 0o077:
    raise RuntimeError(f"{_CACHE} belongs to, or is open to, others: remove it")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Read when Keras is imported, which is where the first test needs it.
os.environ["KERAS_BACKEND"] = "jax"

import jax  # noqa: E402  the settings above are read when it is imported
import pytest  # noqa: E402

# Flax's layers and Optax's optimizers run under this. A test whose model does not (a bare
# `x + positions`) relaxes it for itself, with `jax.numpy_rank_promotion("allow")`.
jax.config.update("jax_numpy_rank_promotion", "raise")

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass
class Compilations:
    """How many programs XLA has compiled since the block began, single operations included."""

    count: int = 0


_counting: list[Compilations] = []


def _count(event: str, duration: float, **details: object) -> None:
    if event == _COMPILED:
        for compilations in _counting:
            compilations.count += 1


# Once and for good: the oldest supported jax can add a listener but not take one away.
jax.monitoring.register_event_duration_secs_listener(_count)


@contextmanager
def _compilations() -> Iterator[Compilations]:
    compilations = Compilations()
    _counting.append(compilations)
    try:
        yield compilations
    finally:
        # By identity: two counters with equal counts compare equal.
        _counting[:] = [other for other in _counting if other is not compilations]


@pytest.fixture
def compilations() -> Callable[[], AbstractContextManager[Compilations]]:
    """`with compilations() as compiled: ...`, then `compiled.count`."""
    return _compilations


_MAPPINGS = 40_000


@pytest.fixture(scope="module", autouse=True)
def _forgotten_programs() -> Iterator[None]:
    """Compiled programs are unloaded where there are many.

    Each takes several memory mappings, and Linux aborts a process that asks for more than 65,530.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > _MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _as_wide_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is printed as wide as where no terminal is; pytest's workers say that theirs has 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def x64() -> Iterator[None]:
    """The test runs with 64-bit numbers on, in every supported jax."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """The test runs without implicit dtype promotion; not for all, since Optax's Adam relies on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
