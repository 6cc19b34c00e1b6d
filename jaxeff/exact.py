"""The metrics of one array by sorting it: what every other way is measured against.

Every function flattens a non-negative array of importances x, of any shape and real dtype, and gives
a scalar; `summarize` gives them all from one sort. N is the number of weights, S their sum and
p = x / S; logarithms are natural. All of it runs under `jit`, `vmap`, `grad` and `scan`.

A negative or non-finite entry makes every float metric nan and is counted in `Metrics.nonfinite`; an
empty array raises ValueError, a boolean or complex one TypeError. Float64 is computed in float64,
anything else, integers included, in float32, to 1e-6 relative of exact arithmetic up to 2^31 - 1
weights. Scratch memory is a few times the input.

Derivatives are closed forms; counts have none. Entropy's slope at x = 0, infinite from the right, is
taken as 0, and so is every slope where a metric stands by convention (an all-zero or invalid layer).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxeff import pairs
from jaxeff.pairs import Pair

COVERAGES = {"coverage_50": 0.5, "coverage_80": 0.8, "coverage_90": 0.9}
TIE = 1 - 2.0**-40  # sums of rounded pairs that meet a target to this factor meet it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Every metric of one array, each a scalar; `vmap` and `scan` put axes in front.

    Fields are as the functions of this module of the same name; `coverage_80` holds 80 % of the
    importance, `sparsity_1e2` counts x < 1e-2. The last three are int32 counts.
    """

    entropy: Array
    normalized_entropy: Array
    effective_params: Array
    utilization: Array
    redundancy: Array
    gini: Array
    coverage_50: Array
    coverage_80: Array
    coverage_90: Array
    sparsity_1e2: Array
    sparsity_1e3: Array
    relative_sparsity_1e2: Array
    relative_sparsity_1e3: Array
    mean: Array
    std: Array
    """Population standard deviation (ddof 0)."""
    max: Array
    zeros: Array
    """Entries equal to 0; -0.0 is one, the smallest subnormal is not."""
    nonfinite: Array
    """Entries that are no importance: nan, infinite or negative."""
    size: Array
    """N."""


@jax.jit
def summarize(x: ArrayLike) -> Metrics:
    """All metrics of x [...] at once, from one sort.

    >>> summarize(jnp.array([4.0, 3.0, 2.0, 1.0])).coverage_90
    Array(0.75, dtype=float32)
    """
    return _summarize(_prepare(x))


@jax.jit
def summarize_padded(x: ArrayLike, size: ArrayLike) -> Metrics:
    """The metrics of the first `size` entries of x [M]; the others must be 0.

    One compiled kernel then serves layers of many sizes.

    Args:
        x: [M], importances, 0 from `size` on.
        size: [], an integer from 1 to M, which may be traced.

    >>> summarize_padded(jnp.array([3.0, 1.0, 0.0, 0.0]), 2).gini
    Array(0.25, dtype=float32)
    """
    return _summarize(_prepare(x, jnp.asarray(size, jnp.int32)))


class Packed(NamedTuple):
    """`Metrics` as two arrays, so that a loop over layers has two results to stack instead of 19."""

    floats: Array  # [..., 16]
    integers: Array  # [..., 3]


_INTEGERS = ("zeros", "nonfinite", "size")
_FLOATS = tuple(field.name for field in dataclasses.fields(Metrics) if field.name not in _INTEGERS)


def pack(metrics: Metrics) -> Packed:
    return Packed(
        *(jnp.stack([getattr(metrics, name) for name in names], -1) for names in (_FLOATS, _INTEGERS))
    )


def unpack(packed: Packed) -> Metrics:
    named = {name: packed.floats[..., i] for i, name in enumerate(_FLOATS)}
    return Metrics(**named, **{name: packed.integers[..., i] for i, name in enumerate(_INTEGERS)})


def _summarize(layer: _Layer) -> Metrics:
    spread = _spread(layer)
    descending = _descending(layer)
    coverages = _coverages(layer, descending, tuple(COVERAGES.values()))
    return Metrics(
        **_information(layer, spread)._asdict(),
        gini=_gini(layer, descending),
        **dict(zip(COVERAGES, coverages, strict=True)),
        sparsity_1e2=_sparsity(layer, 1e-2),
        sparsity_1e3=_sparsity(layer, 1e-3),
        relative_sparsity_1e2=_relative_sparsity(layer, 1e-2),
        relative_sparsity_1e3=_relative_sparsity(layer, 1e-3),
        mean=_valid(layer, _mean(layer)),
        std=_std(layer, spread),
        max=_valid(layer, _with_slope(_max_slope, layer.x, pairs.float_of(layer.bits.max()))),
        zeros=pairs.count(layer.bits == 0) - layer.invalid - _padding(layer),
        nonfinite=layer.invalid,
        size=jnp.asarray(layer.size, jnp.int32),
    )


@jax.jit
def entropy(x: ArrayLike) -> Array:
    """Shannon entropy H = -sum p ln p in nats, with 0 ln 0 = 0.

    From 0, one weight holds all, to ln N, all weights equal. Nan for an all-zero layer.

    References:
        Shannon, A Mathematical Theory of Communication, 1948

    >>> entropy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.6931472, dtype=float32)
    """
    layer = _prepare(x)
    return _information(layer, _spread(layer)).entropy


@jax.jit
def normalized_entropy(x: ArrayLike) -> Array:
    """H / ln N, in [0, 1]. A single weight has 1, an all-zero layer nan.

    >>> normalized_entropy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    layer = _prepare(x)
    return _information(layer, _spread(layer)).normalized_entropy


@jax.jit
def effective_params(x: ArrayLike) -> Array:
    """exp(H): how many equal weights would have this entropy; 0 for an all-zero layer.

    The effective rank of Roy and Vetterli, with importances in place of singular values.

    References:
        Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality, 2007

    >>> effective_params(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(2., dtype=float32)
    """
    layer = _prepare(x)
    return _information(layer, _spread(layer)).effective_params


@jax.jit
def utilization(x: ArrayLike) -> Array:
    """exp(H) / N, in [1/N, 1]; 0 for an all-zero layer.

    Noise does not have 1: |w| has sqrt(e) / 2 = 0.824 for uniform w and 0.753 for normal w.

    >>> utilization(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    layer = _prepare(x)
    return _information(layer, _spread(layer)).utilization


@jax.jit
def redundancy(x: ArrayLike) -> Array:
    """1 - H / ln N, in [0, 1]; 1 for an all-zero layer. Shrinks as 1 / ln N for a given shape.

    >>> redundancy(jnp.array([1.0, 1.0, 0.0, 0.0]))
    Array(0.5, dtype=float32)
    """
    layer = _prepare(x)
    return _information(layer, _spread(layer)).redundancy


@jax.jit
def gini(x: ArrayLike) -> Array:
    """Gini coefficient: 0 when all weights are equal, (N - 1) / N when one holds everything.

    With x sorted ascending and i from 1, G = 2 sum i x_(i) / (N S) - (N + 1) / N. Scaling or
    repeating a layer changes nothing, so layers compare. Nan for an all-zero layer.

    References:
        Hurley and Rickard, Comparing Measures of Sparsity, 2009, arXiv:0811.4706

    >>> gini(jnp.array([0.0, 0.0, 0.0, 1.0]))
    Array(0.75, dtype=float32)
    """
    layer = _prepare(x)
    return _gini(layer, _descending(layer))


@partial(jax.jit, static_argnames="share")
def coverage(x: ArrayLike, share: float) -> Array:
    """Smallest fraction of the weights that together hold `share` of the importance.

    k / N, with k the smallest count whose k largest x reach share * S (to one part in 2^40, so that
    8 of 10 equal weights hold 0.8). Nan for an all-zero layer.

    Args:
        x: [...], importances.
        share: a Python number in (0, 1].

    >>> coverage(jnp.array([4.0, 3.0, 2.0, 1.0]), 0.5)
    Array(0.5, dtype=float32)
    """
    if not (_is_number(share) and 0 < share <= 1):
        raise ValueError(f"`share` must be a number in (0, 1], such as 0.8; got {share!r}.")
    layer = _prepare(x)
    return _coverages(layer, _descending(layer), (float(share),))[0]


@partial(jax.jit, static_argnames="threshold")
def sparsity(x: ArrayLike, threshold: float) -> Array:
    """Fraction of weights with x < threshold, strictly and in exact arithmetic.

    Depends on the scale of x; `relative_sparsity` does not.

    Args:
        x: [...], importances.
        threshold: a finite Python number >= 0.

    >>> sparsity(jnp.array([0.0, 0.01, 0.5, 1.0]), 0.5)
    Array(0.5, dtype=float32)
    """
    return _sparsity(_prepare(x), _checked_threshold(threshold))


@partial(jax.jit, static_argnames="threshold")
def relative_sparsity(x: ArrayLike, threshold: float) -> Array:
    """Fraction of weights with x < threshold * mean(x): sparsity free of scale.

    An x within one part in 2^40 of the bound counts as on it, not below. 1 for an all-zero layer.

    Args:
        x: [...], importances.
        threshold: a finite Python number >= 0, in units of the mean.

    >>> relative_sparsity(jnp.array([0.001, 1.0, 1.0, 1.0]), 1e-2)
    Array(0.25, dtype=float32)
    """
    return _relative_sparsity(_prepare(x), _checked_threshold(threshold))


# The door: any array becomes bit patterns, and floats y = x * 2^rise with their maximum in [1, 2). Sums
# cannot overflow, and what underflows to 0 was below 2^-126 of the maximum.


class _Layer(NamedTuple):
    size: int | Array  # N; traced where the arrays are padded with zeros to M > N, else M
    x: Array  # [M], the importances, invalid ones as 0: the only carrier of derivatives
    bits: Array  # [M], their bit patterns: integers in the same order
    y: Array  # [M], x * 2^rise
    rise: Array  # []
    invalid: Array  # [], how many
    total: Pair  # [], S * 2^rise
    rest: Pair  # [], S less one maximum, * 2^rise
    mean: Pair  # [], S / N * 2^rise


def _prepare(x: ArrayLike, size: Array | None = None) -> _Layer:
    x = _checked(x)
    count = x.size if size is None else size
    bits = pairs.bits_of(x)
    bits = jnp.where(bits == jnp.iinfo(bits.dtype).min, 0, bits)  # -0.0
    invalid = (bits < 0) | (bits >= pairs.bits_of(jnp.asarray(jnp.inf, x.dtype)))
    bits = jnp.where(invalid, 0, bits)
    rise = -pairs.exponent(bits.max(), x.dtype)
    y = pairs.scale(bits, rise, x.dtype)
    rest, total = _totals(y)
    return _Layer(
        size=count,
        x=jnp.where(invalid, 0, x),
        bits=bits,
        y=y,
        rise=rise,
        invalid=pairs.count(invalid),
        total=total,
        rest=rest,
        mean=pairs.divide(total, _exactly(count, y.dtype)),
    )


def _padding(layer: _Layer) -> int | Array:
    return layer.x.size - layer.size


def _sized(layer: _Layer) -> Array:
    """N as a float."""
    return jnp.asarray(layer.size).astype(layer.y.dtype)


def _exactly(count: int | Array, dtype: Any) -> Pair:
    """An integer as a pair of floats: it may have more digits than one float32."""
    if isinstance(count, int):
        return pairs.constant(count, dtype)
    return pairs.fast_two_sum((count & ~0xFFF).astype(dtype), (count & 0xFFF).astype(dtype))


def checked(x: ArrayLike) -> Array:
    """x as an array of importances, of whatever real dtype; what is none is refused."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"`x` must be one array of importances; got {type(x).__name__}.")
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_ or not jnp.isrealobj(x) or not jnp.issubdtype(x.dtype, jnp.number):
        raise TypeError(f"`x` must hold real numbers, one importance per weight; got {x.dtype}.")
    if x.size == 0:
        raise ValueError(f"`x` is empty, shape {x.shape}: a layer without weights has no metrics.")
    return x


def _checked(x: ArrayLike) -> Array:
    x = checked(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32).ravel()


def _checked_threshold(threshold: float) -> float:
    if not (_is_number(threshold) and 0 <= threshold < math.inf):
        raise ValueError(f"`threshold` must be a finite number >= 0; got {threshold!r}.")
    return float(threshold)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _totals(y: Array) -> tuple[Pair, Pair]:
    """(sum less one maximum, sum). The first keeps its relative precision beside a huge maximum."""
    top, none = y.max(), jnp.zeros((), y.dtype)

    def terms(start: Any, width: int) -> list[Array]:
        part = lax.dynamic_slice(y, (start,), (width,))
        return [jnp.where(part == top, 0, part)]

    (below,) = pairs.sums(terms, y.size)
    below = pairs.add(below, pairs.multiply((top, none), _exactly(pairs.count(y == top) - 1, y.dtype)))
    return below, pairs.add((top, none), below)


# Entropy and its kin, from two sums that are never both imprecise.


class _Spread(NamedTuple):
    offset: Pair  # mean d, d = y / mean - 1
    square: Pair  # mean d^2
    excess: Pair  # mean (1 + d) ln(1 + d) - d
    surprise: Pair  # sum p ln(max / x)


class _Information(NamedTuple):
    entropy: Array
    normalized_entropy: Array
    effective_params: Array
    utilization: Array
    redundancy: Array


def _information(layer: _Layer, spread: _Spread) -> _Information:
    """H and D = ln N - H, the smaller one summed directly and the other as its complement."""
    size = _sized(layer)
    shannon, divergence = _entropy(layer, spread), _divergence(layer, spread)
    even = divergence[0] <= shannon[0]
    raised = _with_slope(_divergence_slope, layer.x, divergence[0], _sized(layer), _mean(layer))
    change = raised - lax.stop_gradient(raised)  # 0, with the derivatives of D
    log_size = (
        jnp.log(size) if isinstance(layer.size, Array) else jnp.asarray(math.log(layer.size), size.dtype)
    )
    scale = jnp.where(log_size > 0, log_size, 1)

    def choose(high: Array, low: Array, dead: float) -> Array:
        return _valid(layer, jnp.where(layer.total[0] > 0, jnp.where(even, high, low), dead))

    used = _exp((-divergence[0], -divergence[1])) * jnp.exp(-change)
    count = _exp(shannon) * jnp.exp(-change)
    return _Information(
        choose(log_size - divergence[0] - change, shannon[0] - change, math.nan),
        choose(1 - (divergence[0] + change) / scale, (shannon[0] - change) / scale, math.nan),
        choose(size * used, count, 0),
        choose(used, count / size, 0),
        choose((divergence[0] + change) / scale, 1 - (shannon[0] - change) / scale, 1),
    )


def _exp(exponent: Pair) -> Array:
    return jnp.exp(exponent[0]) * (1 + exponent[1])


def _spread(layer: _Layer) -> _Spread:
    top, mean = layer.y.max(), layer.mean[0]

    def terms(start: Any, width: int) -> list[Array]:
        y = lax.dynamic_slice(layer.y, (start,), (width,))
        d, ratio = (y - mean) / mean, y / top
        surprise = -y * jnp.log(jnp.where((ratio > 0) & (y < top), ratio, 1))
        return [*_own(layer, start, [d, d * d, excess_over_mean(y, mean)]), surprise]

    offset, square, excess, surprise = pairs.sums(terms, layer.y.size)
    size = _exactly(layer.size, mean.dtype)
    return _Spread(
        offset=pairs.divide(offset, size),
        square=pairs.divide(square, size),
        excess=pairs.divide(excess, size),
        surprise=pairs.divide(surprise, layer.total),
    )


def _own(layer: _Layer, start: Any, terms: list[Array]) -> list[Array]:
    """The terms, 0 for those of the padding."""
    if isinstance(layer.size, int):
        return terms
    own = start + jnp.arange(terms[0].size, dtype=jnp.int32) < layer.size
    return [jnp.where(own, term, 0) for term in terms]


def _uneven(layer: _Layer) -> Array:
    lowest = layer.bits
    if isinstance(layer.size, Array):
        own = jnp.arange(layer.bits.size, dtype=jnp.int32) < layer.size
        lowest = jnp.where(own, layer.bits, jnp.iinfo(layer.bits.dtype).max)
    return layer.bits.max() > lowest.min()


def _entropy(layer: _Layer, spread: _Spread) -> Pair:
    """H = ln(S / max) + sum p ln(max / x): terms of one sign, also around a dominant weight."""
    top = (layer.y.max(), jnp.zeros((), layer.y.dtype))
    high, low = pairs.two_sum(jnp.log1p(pairs.divide(layer.rest, top)[0]), spread.surprise[0])
    return high, low + spread.surprise[1]


def _divergence(layer: _Layer, spread: _Spread) -> Pair:
    """D = mean of f(d), d = y / mean - 1, f(d) = (1 + d) ln(1 + d) - d >= 0.

    The rounded mean is off by a factor 1 + e, e = mean d; f(e) takes that out again. As y and the
    mean lie on one grid of floats, f(e) is at most about half of the sum.
    """
    (high, low), (e, _) = spread.excess, spread.offset
    high, low = pairs.fast_two_sum(high, low - e * e / 2 - high * e)
    uneven = _uneven(layer)
    return jnp.where(uneven, high, 0), jnp.where(uneven, low, 0)


def excess_over_mean(y: Array, mean: Array) -> Array:
    """(y / mean) ln(y / mean) - (y / mean - 1) to full relative precision.

    Near the mean by ln(y / mean) = 2 artanh(s), s = (y - mean) / (y + mean).
    """
    ratio, s = y / mean, (y - mean) / (y + mean)
    far = ratio * jnp.log(jnp.where(ratio > 0, ratio, 1)) - (y - mean) / mean
    odd = jnp.zeros_like(s)
    for power in (17, 15, 13, 11, 9, 7, 5, 3):
        odd = odd * (s * s) + 1 / power
    near = 2 * s * s * (1 + (1 + s) * s * odd) / (1 - s)
    return jnp.where(jnp.abs(s) < 1 / 4, near, far)


# Moments and counts.


def _valid(layer: _Layer, value: Array) -> Array:
    return jnp.where(layer.invalid > 0, jnp.nan, value)


def _mean(layer: _Layer) -> Array:
    return _with_slope(_mean_slope, layer.x, pairs.unscale(layer.mean[0], layer.rise), _sized(layer))


def _std(layer: _Layer, spread: _Spread) -> Array:
    variance = jnp.maximum(spread.square[0] - spread.offset[0] ** 2, 0)
    uneven = _uneven(layer)
    std = pairs.unscale(jnp.where(uneven, layer.mean[0] * jnp.sqrt(variance), 0), layer.rise)
    return _valid(layer, _with_slope(_std_slope, layer.x, std, _sized(layer), _mean(layer)))


def _sparsity(layer: _Layer, threshold: float) -> Array:
    below = pairs.count(layer.bits < pairs.bits_of(float_at_least(threshold, layer.y.dtype)))
    return _valid(layer, _fraction(layer, below, threshold))


def _fraction(layer: _Layer, below: Array, threshold: float) -> Array:
    """Of N: the zeros of the padding are below every threshold but 0."""
    own = below - _padding(layer) if threshold > 0 else below
    return own.astype(layer.y.dtype) / _sized(layer)


def float_at_least(threshold: float, dtype: Any) -> Array:
    """The smallest float >= threshold: float32(0.01), which is below 0.01, has x < 0.01."""
    bound = np.asarray(threshold if threshold <= float(jnp.finfo(dtype).max) else math.inf, dtype)
    # As Python floats: NumPy would round the threshold to the dtype first.
    return jnp.asarray(bound if float(bound) >= threshold else np.nextafter(bound, np.asarray(np.inf, dtype)))


def _relative_sparsity(layer: _Layer, threshold: float) -> Array:
    # No weight exceeds N < 2^40 means.
    bound = pairs.constant(min(threshold, 2.0**40) * TIE, layer.y.dtype)
    high, low = pairs.multiply(layer.mean, bound)
    below = _fraction(layer, pairs.count((layer.y - high) - low < 0), threshold)
    return _valid(layer, jnp.where(layer.total[0] > 0, below, 1))


# What needs an order.


def _descending(layer: _Layer) -> Array:
    """y, largest first. Sorting integers is four times faster than sorting floats on a CPU."""
    return pairs.float_of(-lax.sort(-pairs.bits_of(layer.y), is_stable=False))


def _gini(layer: _Layer, descending: Array) -> Array:
    """Sum over pairs, k-th largest less k-th smallest, times the distance of their ranks."""
    half, size = descending.size // 2, layer.size
    # With padding, the k-th smallest of N stands before the array's start for k > N.
    lead = 0 if isinstance(size, int) else half
    ascending_ends = jnp.pad(descending, (lead, 0))

    def terms(start: Any, width: int) -> list[Array]:
        large = lax.dynamic_slice(descending, (start,), (width,))
        small = lax.dynamic_slice(ascending_ends, (lead + size - start - width,), (width,))[::-1]
        distance = jnp.maximum((size - 1) - 2 * (start + jnp.arange(width, dtype=jnp.int32)), 0)
        return [distance.astype(large.dtype) * (large - small)]

    (differences,) = pairs.sums(terms, half)
    value = pairs.divide(differences, layer.total)[0] / _sized(layer)
    value = _with_slope(_gini_slope, layer.x, value, _sized(layer), _mean(layer))
    return _valid(layer, jnp.where(layer.total[0] > 0, value, jnp.nan))


def _coverages(layer: _Layer, descending: Array, shares: tuple[float, ...]) -> list[Array]:
    """k / N for each share: k found among r blocks of r^2, then r rows of r, then r weights."""
    size = descending.size
    side = math.ceil(size ** (1 / 3))
    side += side**3 < size
    cube = jnp.pad(descending, (0, side**3 - size)).reshape(side, side, side)
    blocks = _blocks(cube)
    targets = [pairs.multiply(layer.total, pairs.constant(share * TIE, cube.dtype)) for share in shares]
    high, low = (jnp.stack(parts) for parts in zip(*targets, strict=True))
    k = jax.vmap(partial(_count_to_reach, cube, blocks))((high, low))
    fractions = jnp.minimum(k, layer.size).astype(cube.dtype) / _sized(layer)
    return [_valid(layer, jnp.where(layer.total[0] > 0, fraction, jnp.nan)) for fraction in fractions]


def _blocks(cube: Array) -> Pair:
    """Sums over the last two axes, the middle one by rows."""
    if not pairs.in_rows():
        flat = cube.reshape(len(cube), -1)
        return pairs.reduce((flat, jnp.zeros_like(flat)))

    def accumulate(row: Array, sums: Pair) -> Pair:
        high, error = pairs.two_sum(sums[0], lax.dynamic_index_in_dim(cube, row, 1, keepdims=False))
        return high, sums[1] + error

    zeros = jnp.zeros(cube.shape[:2], cube.dtype)
    return pairs.reduce(lax.fori_loop(0, cube.shape[1], accumulate, (zeros, zeros)))


def _count_to_reach(cube: Array, blocks: Pair, target: Pair) -> Array:
    none = jnp.zeros((), cube.dtype)
    block, before = _crossing(blocks, (none, none), target)
    rows = lax.dynamic_index_in_dim(cube, block, keepdims=False)
    row, before = _crossing(pairs.reduce((rows, jnp.zeros_like(rows))), before, target)
    weights = lax.dynamic_index_in_dim(rows, row, keepdims=False)
    weight, _ = _crossing((weights, jnp.zeros_like(weights)), before, target)
    return (block * len(cube) + row) * len(cube) + weight + 1


def _crossing(pieces: Pair, before: Pair, target: Pair) -> tuple[Array, Pair]:
    """Index of the first of the pieces whose running sum reaches the target, and the sum before it."""
    starts = pairs.add(pairs.sums_before(pieces), before)
    high, low = pairs.add(starts, pieces)
    short = (high - target[0]) + (low - target[1]) < 0
    index = jnp.minimum(pairs.count(short), short.size - 1)
    return index, (starts[0][index], starts[1][index])


# Derivatives. A value computed from bits has none of its own: `_with_slope` lends it d value / dx.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_slope(slope: Callable[..., Array], x: Array, value: Array, *context: Array) -> Array:
    return value


@_with_slope.defjvp
def _(slope: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _with_slope(slope, *primals), jnp.sum(slope(*primals) * tangents[0])


def _mean_slope(x: Array, mean: Array, size: Array) -> Array:
    return jnp.ones_like(x) / size


def _max_slope(x: Array, largest: Array) -> Array:
    hit = (x == largest).astype(x.dtype)
    return hit / hit.sum()


def _std_slope(x: Array, std: Array, size: Array, mean: Array) -> Array:
    std, mean = _with_slope(_std_slope, x, std, size, mean), _with_slope(_mean_slope, x, mean, size)
    return jnp.where(std > 0, (x - mean) / jnp.where(std > 0, std, 1), 0) / size


def _divergence_slope(x: Array, divergence: Array, size: Array, mean: Array) -> Array:
    """dD/dx = -dH/dx = (ln(x / mean) - D) / S."""
    divergence = _with_slope(_divergence_slope, x, divergence, size, mean)
    mean = _with_slope(_mean_slope, x, mean, size)
    positive = (x > 0) & (mean > 0)
    ratio = jnp.where(positive, x, 1) / jnp.where(positive, mean, 1)
    return jnp.where(positive, jnp.log(ratio) - divergence, 0) / size / jnp.where(mean > 0, mean, 1)


def _gini_slope(x: Array, value: Array, size: Array, mean: Array) -> Array:
    """dG/dx = ((smaller - larger) / N - G) / S, by how many weights are smaller and larger."""
    value, mean = _with_slope(_gini_slope, x, value, size, mean), _with_slope(_mean_slope, x, mean, size)
    # The zeros of the padding are smaller than every positive entry, and count for nothing.
    balance = _rank_balance(x).astype(x.dtype) - jnp.where(x > 0, x.size - size, 0)
    slope = (balance / size - value) / size
    return jnp.where(mean > 0, slope / jnp.where(mean > 0, mean, 1), 0)


def _rank_balance(x: Array) -> Array:
    """Per entry, how many are smaller less how many are larger: equal entries have equal slopes."""
    index = jnp.arange(x.size, dtype=jnp.int32)
    ordered, origin = lax.sort((pairs.bits_of(jnp.abs(x)), index), num_keys=1, is_stable=False)
    change = ordered[1:] != ordered[:-1]
    smaller = lax.cummax(jnp.where(jnp.pad(change, (1, 0)), index, 0))
    larger = x.size - 1 - lax.cummin(jnp.where(jnp.pad(change, (0, 1)), index, x.size - 1), reverse=True)
    return jnp.zeros_like(index).at[origin].set(smaller - larger, unique_indices=True)
