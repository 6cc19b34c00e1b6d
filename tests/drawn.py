"""Arrays of importances of every kind, each from a seed, and how far metrics of them are from exact ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import reference
from numpy.random import Generator

from jaxeff.sketch import Bounds

FIELDS = [field.name for field in dataclasses.fields(Bounds)]
RELATIVE = ("effective_params", "mean", "std", "max")
COVERAGES = {"coverage_50": 0.5, "coverage_80": 0.8, "coverage_90": 0.9}
THRESHOLDS = {"relative_sparsity_1e2": 1e-2, "relative_sparsity_1e3": 1e-3}
_ORACLE = 1e-13  # rounding of the float64 truth
_HALF_SUBNORMAL = 2.0**-150


def _magnitude(generator: Generator, size: int) -> np.ndarray:
    return np.abs(generator.standard_normal(size))


def _scale(generator: Generator) -> float:
    return 10.0 ** generator.uniform(-30, 30)


def _with_one(x: np.ndarray, index: int, value: float) -> np.ndarray:
    x[index % x.size] = value
    return x


def _quantised(generator: Generator, size: int, levels: int) -> np.ndarray:
    magnitudes = _magnitude(generator, size)
    step = np.float32(magnitudes.max() / levels)
    return np.round(magnitudes / step).astype(np.float32) * step


def _floats_of_a_bin(generator: Generator, size: int) -> np.ndarray:
    """All of one run of 2^14 bit patterns."""
    first = np.uint32(generator.integers(1, 2**16 - 512)) << 14
    return (first + generator.integers(0, 2**14, size).astype(np.uint32)).view(np.float32)


def _edges(generator: Generator, size: int) -> np.ndarray:
    """Where bins begin, or one unit in the last place before that."""
    first = generator.integers(1000, 1100, size).astype(np.uint32) + np.uint32(60 * 512)
    return ((first << 14) - generator.integers(0, 2, size).astype(np.uint32)).view(np.float32)


def _ends_of_a_bin(generator: Generator, size: int) -> np.ndarray:
    share = generator.random()
    return np.where(generator.random(size) < share, np.float32(1), np.nextafter(np.float32(1 + 2**-9), 0))


def _beside_a_limit(generator: Generator, size: int) -> np.ndarray:
    """Half of the weights near 1e-2 or 1e-3 of the mean, most of the sum in the others."""
    near = float(generator.choice([1e-2, 1e-3])) * (1 + 1e-3 * generator.standard_normal(size))
    return np.where(generator.random(size) < 0.5, near / 2, 1.0).astype(np.float32)


def _clusters(generator: Generator, size: int) -> np.ndarray:
    centers = np.exp(3 * generator.standard_normal(int(generator.integers(1, 6))))
    jitter = 10.0 ** generator.uniform(-8, -2)
    return generator.choice(centers, size) * (1 + jitter * generator.random(size))


DRAWS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "uniform": lambda g, n: g.random(n) * _scale(g),
    "normal": lambda g, n: _magnitude(g, n) * _scale(g),
    "lognormal": lambda g, n: np.exp(g.uniform(0.01, 12) * g.standard_normal(n)),
    "heavy tail": lambda g, n: g.random(n) ** -g.uniform(0.5, 4),
    "power": lambda g, n: g.random(n) ** g.uniform(1, 30),
    "binary": lambda g, n: (g.random(n) < g.random()) * 0.37,
    "ternary": lambda g, n: g.integers(0, 3, n) * _scale(g),
    "int4": lambda g, n: _quantised(g, n, 8),
    "int8": lambda g, n: _quantised(g, n, 127),
    "nearly constant": lambda g, n: 1 + 10.0 ** g.uniform(-7, -2) * g.random(n),
    "nearly constant, normal": lambda g, n: np.abs(1 + 10.0 ** g.uniform(-7, -2) * g.standard_normal(n)),
    "constant": lambda g, n: np.full(n, _scale(g)),
    "two values": lambda g, n: g.choice([1.0, 1 + 10.0 ** g.uniform(-6, 6)], n),
    "clusters": _clusters,
    "one bin": _floats_of_a_bin,
    "ends of a bin": _ends_of_a_bin,
    "on an edge": lambda g, n: np.full(n, np.float32(1 + 7 * 2.0**-9)),
    "about edges": _edges,
    "one ulp more": lambda g, n: _with_one(np.ones(n, np.float32), n // 2, np.nextafter(np.float32(1), 2)),
    "one-hot": lambda g, n: _with_one(np.zeros(n), int(g.integers(n)), _scale(g)),
    "one holds much": lambda g, n: _with_one(_magnitude(g, n), 3, n * 10.0 ** g.uniform(-2, 20)),
    "half zero": lambda g, n: (g.random(n) < 0.5) * _magnitude(g, n),
    "few": lambda g, n: (g.random(n) < 1e-3) * _magnitude(g, n),
    "beside a limit": _beside_a_limit,
    "subnormal": lambda g, n: g.random(n) * 10.0 ** g.uniform(-45, -38.5),
    "smallest": lambda g, n: g.integers(0, g.choice([4, 20, 400]), n) * 2.0**-149,
    "about the smallest normal": lambda g, n: g.random(n) * 10.0 ** g.uniform(-38.5, -35),
    "subnormal and normal": lambda g, n: g.random(n) * np.where(g.random(n) < 0.5, 1e-38, _scale(g)),
    "wide": lambda g, n: 10.0 ** g.uniform(-45, 38, n),
    "largest": lambda g, n: g.random(n) * 3.4e38,
    "constant largest": lambda g, n: np.full(n, np.finfo(np.float32).max),
    "bits": lambda g, n: g.integers(0, 0x7F800000, n).astype(np.uint32).view(np.float32),
    "bfloat16": lambda g, n: (_magnitude(g, n) * _scale(g)).astype(jnp.bfloat16),
    "float16": lambda g, n: (_magnitude(g, n) * 10.0 ** g.uniform(-7, 3)).astype(np.float16),
    "float8_e4m3fn": lambda g, n: _magnitude(g, n).astype(jnp.float8_e4m3fn),
    "float8_e5m2": lambda g, n: _magnitude(g, n).astype(jnp.float8_e5m2),
}  # fmt: skip


def draw(name: str, seed: int, size: int) -> np.ndarray:
    """[size], float32 but for the narrow dtypes."""
    x = DRAWS[name](np.random.default_rng([seed, size, *name.encode()]), size)
    return x.astype(np.float32) if x.dtype == np.float64 else x


def exact(x: np.ndarray) -> dict[str, float]:
    """Every metric of x; ties decided in sums of 64 bits, since float64's own are off by 1e-12."""
    x = x.astype(np.float64)
    metrics = reference.metrics(x)
    if x.max() > 0:
        fallen = np.sort(x)[::-1].astype(np.longdouble)
        reached = np.cumsum(fallen)
        for name, share in COVERAGES.items():
            short = reached < np.longdouble(share) * np.longdouble(reference.TIE) * reached[-1]
            metrics[name] = (int(short.sum()) + 1) / x.size
        for name, threshold in THRESHOLDS.items():
            limit = np.longdouble(threshold) * np.longdouble(reference.TIE) * reached[-1] / x.size
            metrics[name] = float(np.mean(fallen < limit))
    return metrics


def errors(found, want: dict[str, float]) -> dict[str, float]:
    """By field of `Bounds`: relative or absolute as these are, less what the truth itself may be off by."""
    off = {}
    for name in FIELDS:
        value, expected = float(getattr(found, name)), want[name]
        if np.isnan(value) or np.isnan(expected):
            off[name] = 0.0 if np.isnan(value) and np.isnan(expected) else np.inf
            continue
        unit = abs(expected) or 1.0 if name in RELATIVE else 1.0
        error = abs(value - expected) - _ORACLE * max(abs(expected), 1.0 if name not in RELATIVE else 0.0)
        error -= _HALF_SUBNORMAL * (name in ("mean", "std"))
        off[name] = max(0.0, error) / unit
    return off
