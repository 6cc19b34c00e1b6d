"""Outliers and errors of rounding, for every layer: params, apply_fn, batch -> Outliers."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxeff._collect import Where, collect
from jaxeff.model.adapters import resolve
from jaxeff.model.params import Params
from jaxeff.output.shown import Shown
from jaxeff.output.text import some
from jaxeff.prune import _layouts as layouts
from jaxeff.quantization._records import InputRanges, LayerOutliers, invalid_count, median_of
from jaxeff.quantization._table import render
from jaxeff.quantization._weights import weight_errors
from jaxeff.statistics import Ranges, SiteStatistics, Statistics, check_params
from jaxeff.statistics.ranges import FULL


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Outliers(Shown):
    """The result of `jaxeff.outliers`: a row for each layer, in forward order. `str` is a table.

    Attributes:
        rows: of every weight.
    """

    rows: tuple[LayerOutliers, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerOutliers]:
        return iter(self.rows)

    def __getitem__(self, path: str) -> LayerOutliers:
        """Return the row of a layer.

        Raises:
            KeyError: no layer has this path.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no layer {path!r}; there are {some([row.path for row in self.rows], 5)}")

    def __str__(self) -> str:
        return self.table()

    def table(self, *, blocks: bool = False) -> str:
        """Return a row per layer; among more than 20, those that differ only in the number of their block share one.

        Args:
            blocks: whether each block has a row of its own.
        """
        return render(self.rows, blocks)


def outliers(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    statistics: Statistics | None = None,
    where: Where = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Outliers:
    """Find what stands in the way of int8 and fp8 in each layer: outliers of its inputs, and errors of rounding.

    It predicts, and quantizes nothing: what the network loses has to be measured on the quantized network.

    Args:
        params: as in `jaxeff.analyze`.
        apply_fn, batch: as in `jaxeff.analyze`; without them, weights alone.
        statistics: from `jaxeff.collect(..., ranges=True)`, or of several batches from
            `jaxeff.calibrate(..., ranges=True)`, instead of `apply_fn` and `batch`.
        where: which examples or positions of the batch count, as in `jaxeff.collect`.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Returns:
        A row for each weight, and for each layer where a scan stacks them. What has no number has a reason.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or the arguments do not match each other.

    References:
        Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339: outlier channels; Sun et al., Massive Activations in Large
        Language Models, 2024, arXiv:2402.17762: largest over median; Micikevicius et al., FP8 Formats for Deep
        Learning, 2022, arXiv:2209.05433; Liu et al., Training-Free Activation Sparsity in Large Language Models
        (TEAL), 2024, arXiv:2408.14690: the share of inputs under a threshold

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, -1.0, 2.0, 40.0]])
    >>> found = outliers({"w": jnp.array([[1.0], [2.0], [3.0], [4.0]])}, lambda p, x: x @ p["w"], x)["w"]
    >>> found.inputs.median, found.inputs.outlier_channels(1), found.inputs.below(2.0)
    (1.5, [((3,), 26.666666666666668)], 0.5)
    """
    params, apply_fn, batch = resolve(params, apply_fn, batch, rngs, apply_kwargs)
    params = Params.of(params)
    if statistics is None and (apply_fn is not None or batch is not None):
        if apply_fn is None or batch is None:
            missing = "batch" if batch is None else "apply_fn"
            raise ValueError(
                f"`{missing}` is missing: pass both `apply_fn` and `batch`, or neither to read weights alone"
            )
        statistics = collect(params, apply_fn, batch, ranges=True, where=where, rngs=rngs, **apply_kwargs)
    elif apply_fn is not None or batch is not None or where is not None:
        raise ValueError("pass `statistics`, or `apply_fn` and `batch`, and `where` only with these")
    if statistics is None:
        leaves = layouts.by_shape(params.named).leaves
        return Outliers(
            tuple(row for leaf in leaves for row in _rows(leaf, params.named[leaf.path], (), None))
        )
    _check_statistics(params, statistics)
    found = {leaf.path: leaf for leaf in layouts.of_statistics(statistics, params.named).leaves}
    rows = []
    for info in statistics.params:
        uses = tuple(site for site in statistics.sites if site.path == info.path)
        rows += _rows(found[info.path], params.named[info.path], uses, info.reason)
    return Outliers(tuple(rows))


def _check_statistics(params: Params, statistics: Any) -> None:
    check_params(statistics, params.named)
    if statistics.sites and all(
        site.ranges is None and site.without_ranges is None for site in statistics.sites
    ):
        raise ValueError("`statistics` hold no ranges: collect them with `jaxeff.collect(..., ranges=True)`")


def _rows(
    leaf: layouts.Leaf, weight: Any, uses: tuple[SiteStatistics, ...], unread: str | None
) -> list[LayerOutliers]:
    """Return the rows of a leaf: of each layer that it stacks; none if it is not a weight."""
    if leaf.role not in ("weight", "embedding"):
        return []
    axes = leaf.axes or layouts.assumed(leaf.path, leaf.shape)
    units = axes.units if axes.units or axes.inputs else None
    names = layouts.layer_names(leaf.path, leaf.shape, axes.layers)
    errors = weight_errors(weight, axes.layers, units)
    inputs = _inputs(uses, unread, len(names))
    shape = tuple(size for axis, size in enumerate(leaf.shape) if axis not in axes.layers)
    kind, nonlinearity = (uses[0].kind, uses[0].nonlinearity) if uses else ("weight", None)
    rows = []
    for name, weights, ranges in zip(names, errors, inputs, strict=True):
        reasons = [reason for reason in (weights, ranges) if isinstance(reason, str)]
        if units is None and not isinstance(weights, str):
            reasons.append(
                "its uses have different outputs"
                if uses
                else "which axes are its outputs is not known without the model"
            )
        rows.append(
            LayerOutliers(
                name,
                kind,
                shape,
                str(weight.dtype),
                nonlinearity,
                None if isinstance(weights, str) else weights,
                None if isinstance(ranges, str) else ranges,
                tuple(reasons),
            )
        )
    return rows


def _inputs(
    uses: tuple[SiteStatistics, ...], unread: str | None, layers: int
) -> list[InputRanges | str | None]:
    """Return the ranges of the inputs of each layer, over all uses of its weight, or why there are none."""
    counted = [use for use in uses if use.ranges is not None]
    if not counted:
        refused = [use.without_ranges for use in uses if use.without_ranges is not None]
        return [refused[0] if refused else unread] * layers
    if len({use.input_axes for use in counted}) > 1:
        return ["its uses have different inputs"] * layers
    ranges = jax.device_get([use.ranges for use in counted])
    if len({each.channels.shape for each in ranges}) > 1:
        return ["its uses have different inputs"] * layers
    whole = functools.reduce(operator.add, ranges)
    each = [
        np.reshape(sums, (layers, *np.shape(sums)[np.ndim(whole.square) :]))
        for sums in jax.tree.leaves(whole)
    ]
    return [_of_layer(Ranges(*(sums[layer] for sums in each)), counted[0]) for layer in range(layers)]


def _of_layer(ranges: Ranges, use: SiteStatistics) -> InputRanges | str:
    counts = np.asarray(ranges.counts)
    number = int(counts.sum(dtype=np.int64))
    if not number:
        return "none of its inputs counted"
    if invalid := invalid_count(counts):
        return f"{invalid:,} of its inputs are nan or infinite"
    if counts.max() == FULL:
        return "it has seen more inputs of one size than a count holds (2^32): take fewer batches"
    largest, square, fourth, int8, fp8 = (
        float(each) for each in (ranges.largest, ranges.square, ranges.fourth, ranges.int8, ranges.fp8)
    )
    if largest == 0:
        return "all of its inputs are 0"
    channels = np.asarray(ranges.channels)
    seen = use.input.absolute_sum.shape
    shape = tuple(seen[axis] for axis in use.input_axes)
    running = InputRanges(
        largest=largest,
        median=median_of(counts),
        kurtosis=number * fourth / square**2,
        zeros=0.0,
        int8=math.sqrt(int8 / square),
        fp8=math.sqrt(fp8 / square),
        channels=channels,
        shape=shape if math.prod(shape) == channels.size else channels.shape,
        counts=counts,
    )
    return dataclasses.replace(running, zeros=running.below(0))
