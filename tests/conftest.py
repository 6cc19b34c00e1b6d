"""What every test runs under, and the fixtures shared between them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import jax
import pytest

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


@pytest.fixture(scope="module", autouse=True)
def _forgotten_programs() -> Iterator[None]:
    """Compiled programs of one file are unloaded before the next.

    Each takes several memory mappings, and Linux aborts a process that asks for more than 65,530.
    """
    yield
    jax.clear_caches()


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
