"""Arrays of importances of every kind, each from a seed, and how good their metrics have to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import reference
from numpy.random import Generator

from jaxeff.metrics import Bounds, Metrics

FIELDS = [field.name for field in dataclasses.fields(Bounds)]
COVERAGES = {"coverage_50": 0.5, "coverage_80": 0.8, "coverage_90": 0.9}
THRESHOLDS = {"relative_sparsity_1e2": 1e-2, "relative_sparsity_1e3": 1e-3}
_ORACLE = 1e-13  # rounding of the float64 truth
_SMALLEST_NORMAL = 2.0**-126  # results below it may be 0: XLA's CPU flushes them


def _magnitude(generator: Generator, size: int) -> np.ndarray:
    return np.abs(generator.standard_normal(size))


def _scale(generator: Generator) -> float:
    return 10.0 ** generator.uniform(-30, 30)


def _with_one(x: np.ndarray, index: int, value: float) -> np.ndarray:
    x[index % x.size] = value
    return x


def _quantized(generator: Generator, size: int, levels: int) -> np.ndarray:
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
    "int4": lambda g, n: _quantized(g, n, 8),
    "int8": lambda g, n: _quantized(g, n, 127),
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
    "one ulp less": lambda g, n: _with_one(np.ones(n, np.float32), n // 2, np.nextafter(np.float32(1), 0)),
    "one zero": lambda g, n: _with_one(np.full(n, 0.1), n // 2, 0),
    "one-hot": lambda g, n: _with_one(np.zeros(n), int(g.integers(n)), _scale(g)),
    "one holds half": lambda g, n: _with_one(np.full(n, 0.1), n // 2, 0.1 * n),
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


def errors(found: Metrics, want: dict[str, float]) -> dict[str, float]:
    """By field of `Bounds`, in its unit, less what the truth itself may be off by."""
    relative_to = {name: want[name] for name in ("effective_params", "mean", "max")} | {"std": want["mean"]}
    off = {}
    for name in FIELDS:
        value, expected, unit = float(getattr(found, name)), want[name], relative_to.get(name, 1.0)
        if np.isnan(value) or np.isnan(expected):
            off[name] = 0.0 if np.isnan(value) and np.isnan(expected) else np.inf
            continue
        error = abs(value - expected) - _ORACLE * (abs(expected) if name in relative_to else max(1, expected))
        error -= _SMALLEST_NORMAL * (name in ("mean", "std", "max"))
        off[name] = max(0.0, error) / (unit or 1.0)
    return off


def assert_as_promised(found: Metrics, x: np.ndarray, label: object = "", counted: bool = False) -> None:
    """As docs/metrics.md says: what float32 sums in levels reach.

    Args:
        counted: by bit pattern, so that bins of at most 1/512 of what they hold are known by their mean.
    """
    x, want = x.astype(np.float64).ravel(), exact(x.ravel())
    allowed = dict.fromkeys(FIELDS, 2e-6) | dict.fromkeys(("mean", "max", "effective_params"), 5e-6)
    allowed["entropy"] = 2e-6 * max(1, want["entropy"])
    allowed["std"] = max(1e-6, 1e-5 * want["std"] / (want["mean"] or 1))
    # Of the weights of one bin only the mean is known: their pairs differ by 1/4 of its width in the mean.
    crowd = _fullest_bin(x) * 5e-4 + 1 / x.size if counted else 0.0
    allowed["gini"] += crowd
    off = errors(found, want)
    if x.max() > 0:
        fallen = np.sort(x)[::-1]
        held = np.cumsum(fallen.astype(np.longdouble)) / fallen.sum(dtype=np.longdouble)
        for name, share in COVERAGES.items():
            fewest, most = (int(np.sum(held < share + by)) + 1 for by in (-2e-6, 2e-6))
            off[name] = _outside(float(getattr(found, name)), fewest / x.size, min(most, x.size) / x.size)
            allowed[name] = 2e-7 + crowd
        for name, threshold in THRESHOLDS.items():
            near = 2.0**-8 if counted else 2e-6
            low, high = (float(np.mean(x < threshold * x.mean() * (1 + by))) for by in (-near, near))
            off[name] = _outside(float(getattr(found, name)), low, high)
            allowed[name] = 2e-7
    for name in FIELDS:
        assert off[name] <= allowed[name], f"{label}: {name} off by {off[name]}, {allowed[name]} allowed"
    for name in ("zeros", "nonfinite", "size"):
        assert int(getattr(found, name)) == want[name], f"{label}: {name}"


def _fullest_bin(x: np.ndarray) -> float:
    """The share of the weights that the fullest bin has."""
    bins = x[x > 0].astype(np.float32).view(np.uint32) >> 14
    return np.unique(bins, return_counts=True)[1].max() / x.size if bins.size else 0.0


def _outside(value: float, low: float, high: float) -> float:
    return max(low - value, value - high, 0.0)
