"""A report as JSON and back.

JSON has no literals for nan and infinity: nan is null, infinities are the strings "Infinity" and "-Infinity".
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff.metrics._half_normal import Null
from jaxeff.report._recommendations import recommend
from jaxeff.report._records import (
    Activity,
    AttentionReport,
    LayerNumbers,
    LayerReport,
    ModelReport,
    ModuleReport,
    OtherNumbers,
    OtherReport,
    Snapshot,
)
from jaxeff.statistics import HeadlessAttention

# A reader opens any minor version: it ignores fields that it does not know, and takes missing ones as unknown.
# A change that it would misread needs a new major version.
SCHEMA = 3
MINOR = 2


def to_dict(report: Snapshot) -> dict[str, Any]:
    """Return plain Python data: a dict per layer and other leaf, the model, and the recommendations."""
    return {
        "schema": SCHEMA,
        "schema_minor": MINOR,
        "criterion": report.criterion,
        "model": encoded(report.model),
        "layers": encoded(report.rows),
        "others": encoded(report.others),
        "modules": encoded(report.modules),
        "attentions": encoded(report.attentions),
        "headless": encoded(report.headless),
        "recommendations": encoded(recommend(report)),
    }


def to_records(rows: Sequence[LayerReport]) -> list[dict[str, str | int | float | None]]:
    """Return a flat dict per row, of strings, Python numbers and None."""
    return [_record(row) for row in rows]


def _record(row: LayerReport) -> dict[str, str | int | float | None]:
    null, activity = row.null, row.activity
    return {
        "path": row.path,
        "kind": row.kind,
        "shape": "x".join(map(str, row.shape)),
        "weights": row.size,
        "dtype": row.dtype,
        "bytes": row.bytes,
        "nonlinearity": row.nonlinearity,
        "side": row.side,
        "note": row.note,
        "uses": row.uses,
        "macs": row.macs,
        **{field.name: getattr(row.metrics, field.name).item() for field in dataclasses.fields(row.metrics)},
        **{
            f"null_{field.name}": None if null is None else getattr(null, field.name).item()
            for field in dataclasses.fields(Null)
        },
        "units": row.unit_count,
        "effective_units": row.effective_units.item(),
        "effective_fan_in": row.effective_fan_in.item(),
        "dead_units": None if activity is None else int(activity.dead),
        "saturated_units": None if activity is None else int(activity.saturated),
        "nonfinite_weights": row.nonfinite_weights.item(),
        "largest_weight": row.largest_weight.item(),
    }


def to_json(report: Snapshot, *, indent: int | None = None) -> str:
    return json.dumps(to_dict(report), allow_nan=False, indent=indent)


Assembled = TypeVar("Assembled")


def from_json(text: str, assemble: Callable[..., Assembled]) -> Assembled:
    """Read a report from its parts, as taken by `Report.assemble`."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a jaxeff report: {error}") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise ValueError(
            "not a jaxeff report: it has no schema version. Pass what `Report.to_json` returned."
        )
    if data["schema"] != SCHEMA:
        schema = reprlib.repr(data["schema"])
        raise ValueError(f"the report has schema {schema}, this version of jaxeff reads {SCHEMA}")
    try:
        rows = _decoded(tuple[LayerReport, ...], data["layers"])
        others = _decoded(tuple[OtherReport, ...], data["others"])
        modules = _decoded(tuple[ModuleReport, ...], data["modules"])
        model = _decoded(ModelReport, data["model"])
        _check(rows, others, modules)
        _check_scalars(model, ModelReport, "model")
        _check_count(model.excluded)
        return assemble(
            criterion=_decoded(str, data["criterion"]),
            rows=rows,
            others=others,
            modules=modules,
            attentions=_decoded(tuple[AttentionReport, ...], data["attentions"]),
            model=model,
            # Reports of schema 3.0 have none.
            headless=_decoded(tuple[HeadlessAttention, ...], data.get("headless", ())),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a jaxeff report: {type(error).__name__} at {str(error)[:200]}") from error


def _check(
    rows: Iterable[LayerReport], others: Iterable[OtherReport], modules: Iterable[ModuleReport]
) -> None:
    """Check what the types of the fields do not say: that shapes agree."""
    for row in rows:
        _ = jnp.dtype(row.dtype)
        _check_scalars(row, LayerNumbers, row.path)
        for count in (row.nonfinite_weights, row.metrics.nonfinite, row.metrics.zeros):
            _check_count(count)
        if not row.size or not all(0 <= axis < len(row.shape) for axis in row.unit_axes):
            raise ValueError(f"{row.path!r}: unit axes {row.unit_axes} of the shape {row.shape}")
        if row.units.shape != row.unit_shape:
            raise ValueError(
                f"{row.path!r}: units of shape {row.units.shape} where {row.unit_shape} should be"
            )
    for other in others:
        _check_scalars(other, OtherNumbers, other.path)
        _check_count(other.nonfinite)
    activities = [row.activity for row in rows if row.activity is not None]
    for activity in (*activities, *(module.activity for module in modules)):
        _check_activity(activity)


def _check_scalars(view: Any, kind: Any, path: str) -> None:
    numbers = {field.name: getattr(view, field.name) for field in dataclasses.fields(kind)}
    _ = numbers.pop("distribution", None)
    if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(numbers)):
        raise ValueError(f"{path!r}: an array where a number should be")


def _check_count(count: jax.Array) -> None:
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(f"{count} where a whole number should be")


def _check_activity(activity: Activity) -> None:
    # One count for all units, or one for each.
    shapes = {leaf.shape for leaf in jax.tree.leaves(activity.sums)} - {()}
    if len(shapes) != 1 or any(
        len(shape) != activity.rank or math.prod(shape) != activity.units for shape in shapes
    ):
        raise ValueError(f"sums of shapes {reprlib.repr(shapes)} for units of shape {activity.shape}")
    if not np.all(np.isfinite(activity.count)):
        raise ValueError(f"{activity.count} where a count of values should be")


def encoded(node: Any) -> Any:
    """Return plain Python data that JSON can hold."""
    if dataclasses.is_dataclass(node):
        return {field.name: encoded(getattr(node, field.name)) for field in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {key: encoded(value) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return [encoded(item) for item in node]
    if isinstance(node, (jax.Array, np.ndarray, np.generic)):
        return encoded(np.asarray(node).tolist())
    if isinstance(node, float) and not math.isfinite(node):
        return None if math.isnan(node) else "Infinity" if node > 0 else "-Infinity"
    return node


def _decoded(kind: Any, data: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _decoded(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple:
        return tuple(_decoded(arguments[0], item) for item in _of(list, data))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, data = typing.get_type_hints(kind), _of(dict, data)
        fields = [f for f in dataclasses.fields(kind) if f.name in data or f.default is dataclasses.MISSING]
        return kind(**{f.name: _decoded(hints[f.name], data[f.name]) for f in fields})
    return _array(data) if kind is jax.Array else _of(kind, data)


def _of(kind: type, data: Any) -> Any:
    if type(data) is not kind:
        raise TypeError(f"{reprlib.repr(data)} where a {kind.__name__} should be")
    if kind is int and data.bit_length() > 63:
        raise ValueError(f"{reprlib.repr(data)}, which is too large")
    return data


def _array(data: Any) -> jax.Array:
    numbers = np.array(_floats(data))
    # Counts and flags were written without a decimal point.
    kinds = {"i": jnp.int32, "b": jnp.bool_}
    return jnp.asarray(numbers, kinds.get(numbers.dtype.kind, jnp.float32))


def _floats(data: Any) -> Any:
    if isinstance(data, list):
        return [_floats(item) for item in data]
    return math.nan if data is None else float(data) if isinstance(data, str) else data
