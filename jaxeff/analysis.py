"""The pipeline: params, apply_fn, batch -> Report."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxeff import importance, layers, leaves, others, totals
from jaxeff.collection import collect
from jaxeff.importance import Criterion
from jaxeff.records import Activity, ModuleReport
from jaxeff.report import Report
from jaxeff.statistics import Place, Statistics


def analyze(
    params: Any,
    apply_fn: Callable | None = None,
    batch: Any = None,
    *,
    criterion: str | Criterion = "activation",
    statistics: Statistics | None = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Report:
    """Which weights of a model earn their keep on this batch.

    Works under `jax.jit`, `jax.vmap` over an ensemble and `jax.lax.scan` over training steps, and
    compiles once for equal models and shapes.

    Args:
        params: the variables dict, its `params` collection or a TrainState's `params`.
        apply_fn: a Linen `apply`, `TrainState.apply_fn`, or `f(params, *batch)`.
        batch: the model's input; a tuple is several positional inputs. Without `apply_fn` and
            `batch`, weights are scored by magnitude alone.
        criterion: 'activation', 'magnitude', 'wanda', or a function `(weight, site) -> importance`; see
            `jaxeff.importance`.
        statistics: from `jaxeff.collect`, instead of `apply_fn` and `batch`.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Returns:
        One row for every weight, in forward order; every other leaf of `params` is counted as what
        it is.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or the arguments do not fit each other.

    >>> import flax.linen as nn
    >>> model = nn.Dense(4, use_bias=False)
    >>> variables = {"params": {"kernel": jnp.ones((3, 4))}}
    >>> report = analyze(variables, model.apply, jnp.ones((8, 3)))
    >>> float(report["kernel"].metrics.utilization)
    1.0
    """
    chosen = importance.criterion_named(criterion)
    core, _ = leaves.split_variables(params)
    named = leaves.named_leaves(core)
    if statistics is None and apply_fn is not None and batch is not None:
        statistics = collect(params, apply_fn, batch, rngs=rngs, **apply_kwargs)
    elif statistics is None and (apply_fn is not None or batch is not None):
        missing = "batch" if batch is None else "apply_fn"
        raise ValueError(
            f"`{missing}` is missing: pass both `apply_fn` and `batch`, or neither to score magnitudes"
        )
    elif statistics is not None and (apply_fn is not None or batch is not None):
        raise ValueError("pass `statistics`, or `apply_fn` and `batch`, not both")
    if statistics is None:
        chosen, statistics = importance.magnitude, Statistics((), (), {}, _places_by_shape(named))
    _check_places(named, statistics)
    return _report(chosen, tuple(named), tuple(named.values()), statistics)


def _places_by_shape(named: dict[str, Any]) -> tuple[Place, ...]:
    """Without a graph, a weight is a floating array of two axes or more, not named bias or scale."""

    def role(path: str, leaf: Any) -> str:
        name = path.rsplit("/", 1)[-1]
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return f"{jnp.result_type(leaf)} array"
        if not jnp.size(leaf):
            return "empty"
        return name if name in ("bias", "scale") else "weight" if jnp.ndim(leaf) > 1 else "vector"

    return tuple(
        Place(path, tuple(jnp.shape(leaf)), str(jnp.result_type(leaf)), role(path, leaf), None)
        for path, leaf in named.items()
    )


def _check_places(named: dict[str, Any], statistics: Statistics) -> None:
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"`statistics` must be Statistics from `jaxeff.collect`, got {type(statistics).__name__}"
        )
    found = {place.path: place.shape for place in statistics.places}
    wanted = {path: tuple(jnp.shape(leaf)) for path, leaf in named.items()}
    if found != wanted:
        different = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        raise ValueError(
            f"`statistics` were collected on other `params`: {different[0]!r} has shape "
            f"{found.get(different[0])} there and {wanted.get(different[0])} here. Collect them with these "
            "`params`."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _report(
    criterion: Criterion, paths: tuple[str, ...], leaves: tuple[Any, ...], statistics: Statistics
) -> Report:
    named = dict(zip(paths, leaves, strict=True))
    weights = [
        layers.Layer(place, named[place.path], tuple(s for s in statistics.sites if s.path == place.path))
        for place in statistics.places
        if place.role == "weight"
    ]
    rows = [part for weight in weights for part in layers.unstacked(weight)]
    structure = tuple(layers.structure(criterion, row) for row in rows)
    numbers, units = layers.measure(criterion, rows)
    rest = [place for place in statistics.places if place.role != "weight"]
    return Report(
        criterion=importance.name(criterion),
        structure=structure,
        other_structure=tuple(others.structure(place) for place in rest),
        numbers=numbers,
        units=units,
        activities=tuple(layers.activity(row) for row in rows),
        other_numbers=others.measure([named[place.path] for place in rest]),
        modules=tuple(
            ModuleReport(module.path, Activity(module.output.absolute_sum.shape, 1, module.output))
            for module in statistics.modules
        ),
        model=totals.model(structure, numbers, sum(math.prod(place.shape) for place in statistics.places)),
    )
