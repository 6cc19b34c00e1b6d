"""The pipeline from params, apply_fn and batch to a Report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxeff import importance, layers
from jaxeff._collect import Where, collect
from jaxeff.importance import Criterion, Score
from jaxeff.layers import non_weights as others
from jaxeff.model import apply as models
from jaxeff.model import low_rank
from jaxeff.model.adapters import resolve
from jaxeff.model.params import Params
from jaxeff.numerics import placement
from jaxeff.report import Activity, AttentionReport, ModuleReport, Report
from jaxeff.report import _totals as totals
from jaxeff.statistics import Derivatives, Statistics, check_params

_LORA = " + lora"  # ends the name of the row of a weight with its low-rank update


def analyze(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    criterion: str | Score | Criterion = "activation",
    loss_fn: Callable | None = None,
    targets: Any = None,
    statistics: Statistics | None = None,
    where: Where = None,
    rngs: Any = None,
    curves: bool = False,
    **apply_kwargs: Any,
) -> Report:
    """Analyze which weights of a model earn their keep on a batch.

    Works under `jax.jit`, `jax.vmap` over an ensemble and `jax.lax.scan` over training steps, and
    compiles once for equal models and shapes.

    Args:
        params: the variables dict, its `params` collection, a TrainState's `params`, or the params from
            `jaxeff.functional`. Or a model that `jaxeff.functional` takes, followed by the batch.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, the function from `jaxeff.functional`, or
            `f(params, *batch)`.
        batch: the model's input; a tuple holds several positional inputs. Without `apply_fn` and
            `batch`, weights are scored by magnitude alone.
        criterion: a name in `jaxeff.importance.CRITERIA`, or a function `(weight, site) -> importance`.
        loss_fn: `loss_fn(outputs, targets)` returns the mean loss, one loss per example, [n], or one per
            position, [n, ...]. Criteria that need gradients require it. Your own criterion then finds
            them in `site.derivatives`.
        targets: any tree of arrays, passed to `loss_fn`.
        statistics: from `jaxeff.collect` or `jaxeff.calibrate`, instead of `apply_fn` and `batch`.
        where: which examples or positions of the batch count, as in `jaxeff.collect`.
        rngs, **apply_kwargs: passed to `apply_fn`.
        curves: also record how the importance of each layer is distributed, for histograms and Lorenz
            curves (`LayerReport.distribution`). The first call takes longer.

    Returns:
        A report with one row per weight, in forward order. A weight with a low-rank update (LoRA of Qwix, NNX or
        Keras) has one more, 'kernel + lora', of what the network multiplies by; no total counts it. Every other
        leaf of `params` is listed with its role.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is invalid, or the arguments do not match each other.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> model = nn.Dense(4, use_bias=False)
    >>> variables = {"params": {"kernel": jnp.ones((3, 4))}}
    >>> report = analyze(variables, model.apply, jnp.ones((8, 3)))
    >>> float(report["kernel"].metrics.utilization)
    1.0
    """
    chosen = importance.named(criterion, with_loss=loss_fn is not None)
    params, apply_fn, batch = resolve(params, apply_fn, batch, rngs, apply_kwargs)
    params = Params.of(params)
    collected = statistics is None
    sums: Mapping[str, jax.Array] = {}
    if not collected and (apply_fn is not None or batch is not None):
        raise ValueError("pass `statistics`, or `apply_fn` and `batch`, not both")
    if where is not None and batch is None:
        raise ValueError(
            "`where` says which parts of `batch` count: pass both, or collect `statistics` with it"
        )
    if apply_fn is not None and batch is not None:
        loss = {"criterion": chosen, "loss_fn": loss_fn, "targets": targets}
        statistics = collect(params, apply_fn, batch, **loss, where=where, rngs=rngs, **apply_kwargs)
        sums = low_rank.effective(models.bind(params, apply_fn, batch, rngs, apply_kwargs))
    elif apply_fn is not None or batch is not None:
        missing = "batch" if batch is None else "apply_fn"
        raise ValueError(
            f"`{missing}` is missing: pass both `apply_fn` and `batch`, or neither to score magnitudes"
        )
    elif collected:
        chosen = _without_model(chosen)
        statistics = Statistics((), (), (), {}, params.by_shape())
    _check_statistics(params, statistics, chosen)
    return _report(chosen, curves, params, statistics, sums)


def _without_model(criterion: Criterion) -> Criterion:
    """Replace the default criterion by magnitude; refuse any other that needs a model."""
    if criterion.function is importance.activation:
        return importance.named("magnitude")
    if criterion.reads_activations or criterion.needs:
        raise ValueError(
            f"`criterion` {criterion.name!r} needs `apply_fn` and `batch`: pass them, or "
            "criterion='magnitude' to score the weights alone"
        )
    return criterion


def _check_statistics(params: Params, statistics: Statistics, criterion: Criterion) -> None:
    check_params(statistics, params.named)
    if missing := importance.missing(criterion, statistics):
        raise ValueError(
            f"`statistics` hold no {missing} for criterion {criterion.name!r}: collect them with "
            f"criterion={criterion.name!r}" + (", `loss_fn` and `targets`" if criterion.needs_loss else "")
        )


def _report(
    criterion: Criterion,
    curves: bool,
    params: Params,
    statistics: Statistics,
    sums: Mapping[str, jax.Array],
) -> Report:
    # `device_put` takes numbers and NumPy arrays in JAX's precision; `jnp.asarray` would compile once per shape.
    named = {
        path: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        for path, leaf in params.named.items()
    }
    weights = {
        info.path: layers.Layer(
            info,
            layers.Arrays(
                named[info.path],
                tuple(site for site in statistics.sites if site.path == info.path),
                statistics.derivatives.get(info.path, Derivatives()),
            ),
        )
        for info in statistics.params
        if info.role == "weight"
    }
    rows = [row for path, weight in weights.items() for row in _with_sum(weight, sums.get(path))]
    structure = tuple(
        dataclasses.replace(one, path=f"{one.path}{_LORA}", is_sum=True) if is_sum else one
        for row, is_sum in rows
        for one in layers.structures(criterion, row)
    )
    numbers, units = layers.measure(criterion, [row for row, _ in rows], curves)
    heads = layers.heads(criterion, weights, statistics.attentions)
    rest = [info for info in statistics.params if info.role != "weight"]
    other_numbers = others.measure([named[info.path] for info in rest])
    # The sums are small. Concrete ones go to the host, where reading them compiles nothing.
    seen = placement.on_host_if_concrete((statistics.sites, statistics.modules, statistics.attentions))
    sites, modules, attentions = seen
    return Report(
        criterion=criterion.name,
        structure=structure,
        other_structure=tuple(others.structure(info) for info in rest),
        numbers=numbers,
        units=units,
        activities=tuple(activity for row, _ in rows for activity in layers.activities(row, sites)),
        other_numbers=other_numbers,
        modules=tuple(
            ModuleReport(module.path, Activity(module.output.absolute_sum.shape, 1, module.output))
            for module in modules
        ),
        attentions=tuple(
            AttentionReport(attention.path, attention.heads, attention.units, attention.entropy, importance)
            for attention, importance in zip(attentions, heads, strict=True)
        ),
        model=dataclasses.replace(
            totals.model(structure, numbers, sum(math.prod(info.shape) for info in statistics.params)),
            relevance_residual=_residual(criterion, statistics),
        ),
        headless=statistics.headless,
    )


def _with_sum(weight: layers.Layer, array: jax.Array | None) -> list[tuple[layers.Layer, bool]]:
    """Return a weight, and the same with its low-rank update, each with whether it is that sum."""
    if array is None:
        return [(weight, False)]
    summed = layers.Layer(weight.place, weight.arrays._replace(weight=array))
    return [(weight, False), (summed, True)]


def _residual(criterion: Criterion, statistics: Statistics) -> Any:
    found = [statistics.conservation[name] for name, _ in criterion.needs if name in statistics.conservation]
    return placement.on_host_if_concrete(found[0]).residual if found else None
