"""The pipeline from params, and a model if there is one, to Spectra."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxeff._collect import collect
from jaxeff.model import apply as models
from jaxeff.model.adapters import resolve
from jaxeff.model.params import Params
from jaxeff.numerics import placement
from jaxeff.prune import Layout
from jaxeff.prune import _layouts as layouts
from jaxeff.spectral import _singular_values as numbers
from jaxeff.spectral._matrices import Heads, Matrix, has_matrices, matrices, roles
from jaxeff.spectral._null import null
from jaxeff.spectral._output_rank import output_rank, second_moments_of
from jaxeff.spectral._records import Spectrum
from jaxeff.spectral._result import Spectra
from jaxeff.statistics import Statistics
from jaxeff.statistics.observe import observe

_NUMBERS = ("utilization", "effective_rank", "stable_rank", "energy_beyond_edge")
_NOT_FINITE = "it holds nan or infinity"
_ZERO = "all of its weights are 0"
_ONE = "it has one row or column, and so one singular value, whatever its weights are"


def spectra(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    statistics: Statistics | None = None,
    share: float | None = 0.99,
    heads: bool = False,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Spectra:
    """Compare the singular values of each weight with those of random numbers of its shape.

    A weight is a matrix of its inputs times its units, with the taps of a convolution among the inputs. Blocks that a
    scan stacks, and members of a batched product, are matrices of their own. Everything but the model's run is
    computed on the host, in float64, one weight at a time.

    Args:
        params: the variables dict, its `params` collection, the params from `jaxeff.functional`, or a model that it
            takes, followed by the batch.
        apply_fn, batch: as in `jaxeff.analyze`. Without them, the axes of a weight are known by its name.
        statistics: from `jaxeff.collect(..., hessians=True)` or `jaxeff.calibrate`, instead of `apply_fn` and `batch`.
        share: of the squared outputs on the batch that `output_rank` keeps. It takes second moments of the inputs,
            4 inputs^2 bytes for each use of each weight. None only traces the model, and compiles nothing.
        heads: whether each attention head, or group of heads that share keys and values, has a matrix of its own. It
            takes a model, and such a matrix has no output rank.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Returns:
        One row per matrix. Those that are not finite, are all 0 or have one row or column say so in `reason`.

    Raises:
        TypeError: an argument has the wrong type, or is traced by `jax.jit`.
        ValueError: an argument is invalid, or the arguments do not match each other.

    >>> noise = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    >>> row = spectra({"kernel": noise})["kernel"]
    >>> print(f"{row.effective_rank_ratio:.2f}, {row.verdict}")
    1.00, indistinguishable from random numbers (normal)
    """
    params, apply_fn, batch = resolve(params, apply_fn, batch, rngs, apply_kwargs)
    params = Params.of(params)
    if any(isinstance(leaf, Tracer) for leaf in params.named.values()):
        raise TypeError(
            "`params` are traced: spectra are computed on the host, so call `jaxeff.spectra` outside `jit`"
        )
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share}; None for no output rank")
    if (apply_fn is None) != (batch is None):
        missing = "batch" if batch is None else "apply_fn"
        raise ValueError(f"`{missing}` is missing: pass both `apply_fn` and `batch`, or neither")
    if statistics is not None and apply_fn is not None:
        raise ValueError("pass `statistics`, or `apply_fn` and `batch`, not both")
    if apply_fn is not None and share is None:
        statistics = _traced(models.from_apply(params, apply_fn, batch, rngs, apply_kwargs))
    elif apply_fn is not None:
        statistics = collect(params, apply_fn, batch, hessians=True, rngs=rngs, **apply_kwargs)
    if heads and statistics is None:
        raise ValueError(
            "`heads` are found in the traced program: pass `apply_fn` and `batch`, or `statistics`"
        )
    layout = (
        layouts.by_shape(params.named)
        if statistics is None
        else layouts.of_statistics(statistics, params.named)
    )
    kept = None if statistics is None else share
    return Spectra(tuple(_rows(params.named, layout, statistics, kept, heads)), kept)


def _traced(model: models.Model) -> Statistics:
    arguments = model.function, model.paths, model.origins, model.batch_size, model.params, model.inputs
    return observe.eval_shape(*arguments)


def _rows(
    named: Mapping[str, Any], layout: Layout, statistics: Statistics | None, share: float | None, heads: bool
) -> Iterator[Spectrum]:
    sites = () if statistics is None else statistics.sites
    parts = _heads(statistics) if heads and statistics is not None else {}
    order = layout if statistics is None else [info.path for info in statistics.params]
    for path in order:
        leaf = layout[path]
        if not has_matrices(leaf):
            continue
        found = roles(path, leaf.shape, leaf.axes)
        own = tuple(size for axis, size in enumerate(leaf.shape) if axis not in found.batch)
        part = parts.get(path)
        if part is not None and part.slices.axis in found.batch:
            part = None  # its heads are matrices of their own anyway
        moments: np.ndarray | str | None = None
        if share is not None and part is None:
            moments = second_moments_of([site for site in sites if site.path == path])
        for index, matrix in enumerate(matrices(path, placement.to_host(named[path]), found, part)):
            row = _spectrum(matrix, own, found.note)
            if row.reason == _NOT_FINITE or moments is None or share is None:
                yield row
            elif isinstance(moments, str):
                yield _with_output_rank(row, moments)
            else:
                yield _with_output_rank(row, output_rank(matrix.elements, moments[index], share))


def _heads(statistics: Statistics) -> dict[str, Heads]:
    """Return the parts of the heads, by the path of the weight."""
    return {
        piece.path: Heads(piece, "head" if attention.units == attention.heads else "group")
        for attention in statistics.attentions
        for piece in attention.slices
    }


def _spectrum(matrix: Matrix, shape: tuple[int, ...], note: str | None) -> Spectrum:
    elements = matrix.elements
    rows, columns = elements.shape
    known = {"path": matrix.path, "shape": shape, "rows": rows, "columns": columns, "note": note}
    expected = null(rows, columns)
    largest = float(np.max(np.abs(elements)))  # nan if any element is
    if not math.isfinite(largest) or largest == 0:
        values, reason = np.full(min(rows, columns), 0 * largest), _ZERO if largest == 0 else _NOT_FINITE
        return Spectrum(
            **known, singular_values=values, null=expected, **dict.fromkeys(_NUMBERS, math.nan), reason=reason
        )
    values = numbers.singular_values(elements)
    return Spectrum(
        **known,
        singular_values=values,
        utilization=numbers.utilization(elements),
        effective_rank=float(numbers.effective_rank(values)),
        stable_rank=float(numbers.stable_rank(values)),
        energy_beyond_edge=numbers.energy_beyond_edge(values, rows, columns),
        null=expected,
        reason=_ONE if len(values) == 1 else None,
    )


def _with_output_rank(row: Spectrum, rank: int | str) -> Spectrum:
    if isinstance(rank, int):
        return dataclasses.replace(row, output_rank=rank)
    missing = f"no output rank: {rank}"
    return dataclasses.replace(row, note=missing if row.note is None else f"{row.note}; {missing}")
