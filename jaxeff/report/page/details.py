"""Numbers for the page's script, which draws the details of a layer when it is opened.

They are rounded to what a screen shows, and large layers are averaged over groups of units, so that the page
stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxeff.metrics import _curve
from jaxeff.output import text
from jaxeff.report._records import LayerReport

UNITS = 512
"""Maximum number of cells of a unit map; further units are averaged in groups of neighbors."""
_POINTS = 33  # of the units' Lorenz curve


def of(rows: Sequence[LayerReport]) -> dict[str, Any]:
    """Return the data for `page.js`, which says how each layer is drawn."""
    return {
        "edges": [float(f"{edge:.6g}") for edge in _curve.EDGES],
        "layers": [_layer(row) for row in rows],
    }


def _layer(row: LayerReport) -> dict[str, Any]:
    spread = row.distribution
    has_spread = spread is not None and bool(np.isfinite(spread.weights).all())
    return {
        "path": row.path,
        "note": row.note,
        "numbers": _numbers(row),
        "weights": _rounded(spread.weights) if has_spread and spread is not None else None,
        "importance": _rounded(spread.importance) if has_spread and spread is not None else None,
        "zeros": round(int(row.metrics.zeros) / row.size, 5),
        "coverages": _coverages(row.metrics),
        "nullCoverages": None if row.null is None else _coverages(row.null),
        **_units(row),
    }


_SIDES = {"post": "weights and activations", "input": "weights and inputs", "magnitude": "weights alone"}


def _numbers(row: LayerReport) -> list[tuple[str, str]]:
    m, percent, decimal, number = row.metrics, text.percent, text.decimal, text.number
    shown = [
        ("scored on", _SIDES.get(row.side, row.side)),
        ("shape", " × ".join(map(str, row.shape))),
        ("weights", f"{row.size:,}"),
        ("bytes", f"{row.bytes:,} in {row.dtype}"),
        ("multiply-accumulates an example", "unknown" if row.macs is None else f"{row.macs:,}"),
        ("utilization", percent(float(m.utilization))),
        ("null utilization", "–" if row.null is None else percent(float(row.null.utilization))),
        ("effective weights", number(float(m.effective_params))),
        ("effective units", f"{number(float(row.effective_units))} of {row.unit_count:,}"),
        ("effective weights a unit", number(float(row.effective_fan_in))),
        ("redundancy", percent(float(m.redundancy))),
        ("Gini", decimal(float(m.gini))),
        ("null Gini", "–" if row.null is None else decimal(float(row.null.gini))),
        ("weights that hold 50 %", percent(float(m.coverage_50))),
        ("weights that hold 80 %", percent(float(m.coverage_80))),
        ("weights that hold 90 %", percent(float(m.coverage_90))),
        ("below 1 % of the mean", percent(float(m.relative_sparsity_1e2))),
        ("importance exactly 0", f"{int(m.zeros):,}"),
        ("used in", f"{row.uses} places" if row.uses > 1 else ""),
        ("dead units", "" if row.activity is None else f"{int(row.activity.dead):,}"),
        ("saturated units", _saturated(row)),
    ]
    return [(name, value) for name, value in shown if value]


def _saturated(row: LayerReport) -> str:
    """Return the saturated units, or nothing if the nonlinearity has no bounds."""
    known = row.activity is not None and row.activity.sums.saturated is not None
    return f"{int(row.activity.saturated):,}" if known and row.activity is not None else ""


def _coverages(metrics: Any) -> list[float | None]:
    found = [float(getattr(metrics, f"coverage_{share}")) for share in (50, 80, 90)]
    return [None if math.isnan(coverage) else float(f"{coverage:.6g}") for coverage in found]


def _units(row: LayerReport) -> dict[str, Any]:
    """Return the units' importance over its mean, and how it is spread; None if it is not finite."""
    units = np.asarray(row.units, np.float64).reshape(-1)
    shape = [math.prod(row.unit_shape[:-1]), row.unit_shape[-1]]
    if not np.isfinite(units).all() or not units.sum() > 0:
        return {"units": None, "unitShape": shape, "group": 1, "dead": [], "unitLorenz": None}
    group = -(-units.size // UNITS)
    starts = np.arange(0, units.size, group)
    means = np.add.reduceat(units, starts) / np.diff(np.append(starts, units.size))
    ascending = np.concatenate([[0.0], np.cumsum(np.sort(units))])
    at = np.linspace(0, units.size, _POINTS)
    lorenz = np.interp(at, np.arange(units.size + 1), ascending) / ascending[-1]
    return {
        "units": np.round(means / units.mean(), 3).tolist(),
        "unitShape": shape,
        "group": group,
        "dead": _dead(row) if group == 1 else [],
        "unitLorenz": _rounded(lorenz),
    }


def _dead(row: LayerReport) -> list[int]:
    if row.activity is None or row.nonlinearity == "identity":
        return []
    return np.flatnonzero(np.asarray(row.activity.maximum).reshape(-1) == 0).tolist()


def _rounded(values: Any) -> list[float]:
    return np.round(np.asarray(values, np.float64), 5).tolist()
