"""Recommendations from a report, each with the numbers it rests on.

There are two sets of rules. The methodology's three compare a metric with a fixed threshold. They were set for
scores that grow with abs(w) and are not applied to squared or gradient scores, which are inherently more
concentrated. The calibrated rules compare a layer with its null, the same metric if the weights were noise.
Where the two disagree, trust the calibrated ones; their docstrings say why. A measured sensitivity outranks
both.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxeff.output.shown import Shown
from jaxeff.output.text import number
from jaxeff.report._limits import LIMITS, Limits, chance, interpret_redundancy
from jaxeff.report._records import LayerReport, Snapshot


@dataclasses.dataclass(frozen=True, repr=False)
class Recommendation(Shown):
    """One recommendation, with its evidence. `str(recommendation)` is a sentence.

    Attributes:
        rule: name of the rule: 'dead units', 'below null', 'measured sensitivity', ...
        path: of the layer; None for the model.
        message: what to do, in a sentence.
        evidence: the numbers that the rule compared.
        saved_macs: multiply-accumulates per example saved at most; None if unknown.
        saved_bytes: bytes of weights saved at most; None for the model.
    """

    rule: str
    path: str | None
    message: str
    evidence: Mapping[str, float]
    saved_macs: int | None = None
    saved_bytes: int | None = None

    def __str__(self) -> str:
        return f"[{self.rule}] {self.path + ': ' if self.path else ''}{self.message}{self._worth()}"

    def _worth(self) -> str:
        if not self.saved_bytes:
            return ""
        macs = "" if self.saved_macs is None else f"{number(self.saved_macs)} MACs an example and "
        return f" Worth at most {macs}{number(self.saved_bytes)} bytes."


class MeasuredLosses(Protocol):
    """Losses with one layer at a time pruned, as measured by `jaxeff.prune.sensitivity`."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def sparsities(self) -> tuple[float, ...]: ...
    @property
    def dense(self) -> Any: ...
    @property
    def order(self) -> str: ...
    def highest(self, tolerance: float) -> Mapping[str, float]: ...
    def rises(self) -> Any: ...


def recommend(
    report: Snapshot, limits: Limits = LIMITS, sensitivity: MeasuredLosses | None = None
) -> tuple[Recommendation, ...]:
    """Return the recommendations of all rules, ranked by the multiply-accumulates they would save, then by bytes.

    Removing single weights saves time only where zeros are skipped; a dense product takes as long with zeros in
    it. Recommendations for the model come last, since their saving is unknown.

    Args:
        sensitivity: from `jaxeff.prune.sensitivity`, of the same model; adds the measurement of each layer.

    Raises:
        ValueError: the sensitivity belongs to other params.
    """
    measured = {} if sensitivity is None else _measured(sensitivity, report, limits)
    found: list[Recommendation] = []
    for row in report.rows:
        found += _of_layer(row, limits)
        # Layers that a scan stacks are one leaf, which is reported once, after the first.
        leaf = row.path if row.path in measured else _leaf(row.path)
        found += [measured.pop(leaf)] if leaf in measured else []
    found += measured.values()
    return (*sorted(found, key=_worth, reverse=True), *_on_concentration(found), *_of_model(report, limits))


SHOWN, _LEAST = 7, 0.001  # recommendations to show, and of the model's bytes that one must be worth


def grouped(advice: Sequence[Recommendation], report: Snapshot) -> list[Recommendation]:
    """Return at most seven recommendations to show: one per rule for all layers of a stack, or of a kind.

    Those worth less than 0.1 % of the model's bytes are left out, and so are what does not fit: `recommend` has all.
    """
    least = _LEAST * sum(row.bytes for row in report.rows if not row.is_sum)
    joined = _joined(advice, _of_stack)
    worthy = [each for each in joined if each.saved_bytes is None or each.saved_bytes >= least]
    return (worthy if len(worthy) <= SHOWN else _joined(worthy, _of_kind))[:SHOWN]


def _of_stack(advice: Recommendation) -> tuple[str, str]:
    """Layers of a scan, or of numbered blocks, which differ in a number alone."""
    return advice.rule, re.sub(r"\d+", "*", advice.path or "")


def _of_kind(advice: Recommendation) -> tuple[str, str]:
    return advice.rule, "" if advice.path else "model"


def _joined(advice: Sequence[Recommendation], key: Callable[[Recommendation], Any]) -> list[Recommendation]:
    """One recommendation for all with the same key, in the place of the first, with what all would save."""
    together: dict[Any, list[Recommendation]] = {}
    for each in advice:
        together.setdefault(key(each), []).append(each)
    return [_one_of(several) for several in together.values()]


def _one_of(several: Sequence[Recommendation]) -> Recommendation:
    first = several[0]
    if len(several) == 1:
        return first
    macs = [each.saved_macs for each in several]
    counts = [int(each.evidence.get("joined", 1)) for each in several]
    layers = sum(counts)
    # Layers of a kind are joined after those of a stack, and are counted once.
    message = first.message.removesuffix(_besides(counts[0])) + _besides(layers)
    return dataclasses.replace(
        first,
        message=message,
        evidence={**first.evidence, "joined": float(layers)},
        saved_macs=None if None in macs else sum(filter(None, macs)),
        saved_bytes=sum(each.saved_bytes or 0 for each in several),
    )


def _besides(layers: int) -> str:
    return f" The same holds for {layers - 1:,} more layer{'s' * (layers > 2)}." * (layers > 1)


def _worth(advice: Recommendation) -> tuple[int, int]:
    return advice.saved_macs or 0, advice.saved_bytes or 0


def _saved(rows: Iterable[LayerReport], share: float) -> dict[str, int | None]:
    """Return what removing this share of the layers' weights would save."""
    rows = list(rows)
    macs = [row.macs for row in rows if row.macs is not None]
    return {
        "saved_macs": round(share * sum(macs)) if len(macs) == len(rows) else None,
        "saved_bytes": round(share * sum(row.bytes for row in rows)),
    }


def _of_layer(row: LayerReport, limits: Limits) -> Iterator[Recommendation]:
    yield from _dead_units(row)
    if math.isnan(float(row.metrics.utilization)) or float(row.metrics.max) == 0:
        return
    yield from _below_null(row, limits)
    if _by_size(row):
        yield from _layer_redundancy(row, limits)


def _by_size(row: LayerReport) -> bool:
    """Return whether the methodology's thresholds apply to the layer's scores."""
    return row.side not in ("gradient", "none")


def _dead_units(row: LayerReport) -> Iterator[Recommendation]:
    """Recommend removing units that emitted only zeros, which changes nothing on this batch."""
    if row.activity is None or not bool(row.evidence_finite):
        return
    dead, units = int(row.activity.dead), row.activity.units
    if not 0 < dead or row.nonlinearity == "identity":
        return
    share = dead / units
    yield Recommendation(
        "dead units",
        row.path,
        f"{dead:,} of {units:,} units {'emits' if dead == 1 else 'emit'} nothing on this batch "
        f"({int(row.activity.count):,} values each): "
        f"{round(share * row.size):,} weights here, and those that read them. Check on more data, then "
        "remove.",
        {"dead_units": dead, "units": units, "values": float(row.activity.count)},
        **_saved([row], share),
    )


def _below_null(row: LayerReport, limits: Limits) -> Iterator[Recommendation]:
    """Report that fewer weights hold the importance than if they were noise.

    The entropy chain rule says where to remove: whole units, or weights within them.
    """
    if row.null is None:
        return
    utilization, null = float(row.metrics.utilization), float(row.null.utilization)
    if not null - utilization > limits.below_null + chance(row.size):
        return
    units = float(row.effective_units) / row.unit_count
    fan_in = float(row.effective_fan_in) * row.unit_count / row.size
    where = (
        f"most of it among the units ({float(row.effective_units):,.0f} effective of {row.unit_count:,}): "
        "try fewer units"
        if units < fan_in
        else f"most of it within the units ({float(row.effective_fan_in):,.0f} effective weights each of "
        f"{row.size // row.unit_count:,}): try masks on single weights"
    )
    yield Recommendation(
        "below null",
        row.path,
        f"utilization {utilization:.1%}, null {null:.1%}; {where}.",
        {
            "utilization": utilization,
            "null_utilization": null,
            "effective_units": float(row.effective_units),
            "effective_fan_in": float(row.effective_fan_in),
        },
        **_saved([row], 1 - utilization / null),
    )


def _on_concentration(found: Iterable[Recommendation]) -> Iterator[Recommendation]:
    """Say once what holds for all layers below their null."""
    layers = sum(each.rule == "below null" for each in found)
    if layers:
        yield Recommendation(
            "concentration",
            None,
            "layers below their null are a reason to try, not a proof: measure the loss as you remove. Units that a "
            "residual connection shares go from all of its layers at once; `prune.groups` says which.",
            {"layers": layers},
        )


def _layer_redundancy(row: LayerReport, limits: Limits) -> Iterator[Recommendation]:
    """Apply the methodology's rule 1: redundancy above 60 %. It is rare in large layers, as it shrinks with ln N."""
    redundancy = float(row.metrics.redundancy)
    if redundancy > limits.layer_redundancy:
        yield Recommendation(
            "layer redundancy",
            row.path,
            f"redundancy {redundancy:.0%} ({interpret_redundancy(redundancy, limits)}): reduce its units or "
            "prune it structurally, the highest first.",
            {"redundancy": redundancy, "limit": limits.layer_redundancy},
            **_saved([row], 1 - float(row.metrics.utilization)),
        )


def _measured(sensitivity: MeasuredLosses, report: Snapshot, limits: Limits) -> dict[str, Recommendation]:
    """Return for each leaf how far it could be pruned alone before the loss rose by more than the limit."""
    known = {row.path for row in report.rows} | {other.path for other in report.others}
    if strange := set(sensitivity.paths) - known - set(map(_leaf, known)):
        raise ValueError(f"`sensitivity` belongs to other params: the report has no {sorted(strange)[0]!r}")
    tolerance = limits.loss_rise * abs(float(sensitivity.dense))
    highest = sensitivity.highest(tolerance)
    return {
        path: dataclasses.replace(
            _of_curve(sensitivity, index, highest[path], tolerance),
            **_saved([row for row in report.rows if path in (row.path, _leaf(row.path))], highest[path]),
        )
        for index, path in enumerate(sensitivity.paths)
    }


def _of_curve(sensitivity: MeasuredLosses, index: int, highest: float, tolerance: float) -> Recommendation:
    sparsity = highest or sensitivity.sparsities[0]
    rise = float(sensitivity.rises()[index, sensitivity.sparsities.index(sparsity)])
    dense = float(sensitivity.dense)
    pruned = f"pruned alone by {sensitivity.order} {'up ' if highest else ''}to {100 * sparsity:.3g} %"
    rose = f"{rise:.2g} from {dense:.3g} (measured)"
    message = (
        f"{pruned}, the loss rose by at most {rose}."
        if highest
        else f"{pruned}, the loss rose by {rose}: prune other layers first."
    )
    evidence = {"sparsity": sparsity, "loss_rise": rise, "dense_loss": dense, "limit": tolerance}
    return Recommendation("measured sensitivity", sensitivity.paths[index], message, evidence)


def _leaf(path: str) -> str:
    """Return the leaf of a layer's path: 'blocks/kernel[3]' is one of the layers stacked in 'blocks/kernel'."""
    return path.rsplit("[", 1)[0]


def _of_model(report: Snapshot, limits: Limits) -> Iterator[Recommendation]:
    if all(map(_by_size, report.rows)):
        yield from _model_utilization(report, limits)
        yield from _model_sparsity(report, limits)
    yield from _at_null(report, limits)


def _model_utilization(report: Snapshot, limits: Limits) -> Iterator[Recommendation]:
    """Apply the methodology's rule 2: utilization of the whole model below 30 %."""
    utilization, null = float(report.model.utilization), float(report.model.null_utilization)
    if utilization < limits.model_utilization:
        yield Recommendation(
            "model utilization",
            None,
            f"utilization {utilization:.1%}, null {null:.1%}: the model is oversized for this data. Try "
            "layers narrower by 30-50 %, and measure.",
            {"utilization": utilization, "null_utilization": null, "limit": limits.model_utilization},
        )


def _model_sparsity(report: Snapshot, limits: Limits) -> Iterator[Recommendation]:
    """Apply the methodology's rule 3: more than half of the weights are faint.

    Faint is relative to each layer's own mean. The methodology's absolute threshold changes if one layer is scaled
    up and the next down, which leaves the network's function unchanged.
    """
    sparsity = float(report.model.relative_sparsity_1e2)
    if sparsity > limits.sparsity:
        yield Recommendation(
            "model sparsity",
            None,
            f"{sparsity:.1%} of the weights have less than 1 % of their layer's mean importance: a "
            "candidate for pruning 40-60 % of the weights. Measure the loss.",
            {
                "relative_sparsity_1e2": sparsity,
                "sparsity_1e2": float(report.model.sparsity_1e2),
                "limit": limits.sparsity,
            },
        )


def _at_null(report: Snapshot, limits: Limits) -> Iterator[Recommendation]:
    """Report layers that look like noise, whose metrics support no advice."""
    close = [
        row
        for row in report.rows
        if row.null is not None
        and abs(float(row.metrics.utilization) - float(row.null.utilization)) <= limits.of_noise(row.size)
    ]
    if close:
        yield Recommendation(
            "at null",
            None,
            f"{len(close)} of {len(report.rows)} layers {'is' if len(close) == 1 else 'are'} spread as noise would "
            f"be (utilization within {limits.at_null:.2f} of the null, or within chance), which says nothing about "
            "how much of them can go: networks like that may lose most of their weights. `jaxeff.advise` measures it.",
            {"layers": len(close), "of": len(report.rows), "limit": limits.at_null},
        )
