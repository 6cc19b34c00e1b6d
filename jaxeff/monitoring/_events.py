"""Early signs of trouble, from the numbers of a check, the check before it and the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jaxeff.monitoring._names import attention_paths, modules, ratio, was_passed
from jaxeff.monitoring._records import LeafLayout, Vitals
from jaxeff.report import Report


@dataclasses.dataclass(frozen=True)
class Event:
    """An early sign of trouble in one weight or attention. `str(event)` is a sentence.

    Attributes:
        path: of the weight, or of the attention.
        sign: one of

            - 'dead units', 'dormant units';
            - 'effective parameters';
            - 'not finite', of weights, and 'gradient not finite';
            - 'fallen back', if the criterion's statistics are not finite, so that magnitudes replace the scores.
              A weight that is not finite, or has fallen back, has no other sign of its units or effective weights;
            - 'update ratio', of the norm of the update to that of the weight;
            - 'attention logit', 'attention entropy'.
        step: update at which it was seen.
        first: number at the start; None for signs that compare with nothing.
        previous: number at the check before; None for signs that compare with nothing.
        now: number at this check.
        of: total number of units or weights, or the limit that the number has crossed.
    """

    path: str
    sign: str
    step: int
    first: float | None
    previous: float | None
    now: float
    of: float

    def __str__(self) -> str:
        where = f"step {self.step}: {self.path}: "
        if self.sign == "fallen back":
            return f"{where}statistics are not finite; scored by magnitude"
        digits = ",.0f" if self.sign in _COUNTED else ".3g"
        if self.sign in _COUNTED:
            said = f"{self.now:{digits}} of {self.of:{digits}} {_COUNTED[self.sign]}"
        else:
            said = f"{_MEASURED[self.sign]} is {self.now:{digits}}, beyond {self.of:{digits}}"
        if self.first is None or self.previous is None:
            return where + said
        return (
            f"{where}{said}; {self.previous:{digits}} at the check before, {self.first:{digits}} at the start"
        )


_COUNTED = {
    "dead units": "units are dead",
    "dormant units": "units are dormant",
    "effective parameters": "weights are effective",
    "not finite": "weights are not finite",
    "gradient not finite": "elements of the gradient are not finite",
}
_MEASURED = {
    "update ratio": "the norm of the update over that of the weight",
    "attention logit": "the largest attention logit",
    "attention entropy": "the mean entropy of the heads",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of events, as `jaxeff.monitor` describes them."""

    growth: float
    collapse: float
    largest_logit: float
    entropy_collapse: float
    update_ratio: tuple[float, float]


def events(
    limits: Limits,
    leaves: Sequence[LeafLayout],
    report: Report,
    step: int,
    first: Vitals,
    previous: Vitals,
    now: Vitals,
    *,
    is_new: bool,
) -> tuple[Event, ...]:
    """Return the signs in all weights in forward order, and then those in the attentions.

    Args:
        report, first, previous, now: on the host.
        step: of the check.
        is_new: whether the report is of this step too, so that its signs have not been told yet.
    """
    parts = modules(leaves)
    found: list[Event] = []
    for at in range(len(report.structure)):
        found += _of_tensors(limits, parts, report, at, step, now)
        found += _of_units(limits, report, at, step, first, previous, now, is_new)
    for at, path in enumerate(attention_paths(report)):
        found += _of_attention(limits, path, at, step, first, previous, now)
    return tuple(found)


def _of_tensors(
    limits: Limits, parts: dict[str, list[int]], report: Report, at: int, step: int, now: Vitals
) -> Iterator[Event]:
    """Return signs that one weight, its gradient and its update show by themselves."""
    path, size = report.structure[at].path, report.structure[at].size
    if path not in parts:
        return
    (part,) = parts[path]
    if bad := int(now.params.nonfinite[part]):
        yield Event(path, "not finite", step, None, None, bad, size)
    if was_passed(now.gradients) and (bad := int(now.gradients.nonfinite[part])):
        yield Event(path, "gradient not finite", step, None, None, bad, size)
    share = ratio(float(now.updates.norm[part]), float(now.params.norm[part]))
    low, high = limits.update_ratio
    if was_passed(now.updates) and (share < low or share > high):
        yield Event(path, "update ratio", step, None, None, share, low if share < low else high)


def _of_units(
    limits: Limits,
    report: Report,
    at: int,
    step: int,
    first: Vitals,
    previous: Vitals,
    now: Vitals,
    is_new: bool,
) -> Iterator[Event]:
    """Return signs in the units of one weight and in how its importance is spread."""
    row = report.structure[at]
    if int(report.numbers.nonfinite_weights[at]):
        return
    if not bool(report.numbers.evidence_finite[at]):
        if is_new:
            yield Event(row.path, "fallen back", step, None, None, row.size, row.size)
        return
    for sign, field in (("dead units", "dead"), ("dormant units", "dormant")):
        start, before, units = (float(getattr(one.activations, field)[at]) for one in (first, previous, now))
        if units - start >= limits.growth * row.unit_count:
            yield Event(row.path, sign, step, start, before, units, row.unit_count)
    start, before, left = (float(one.effective_params[at]) for one in (first, previous, now))
    if is_new and left <= limits.collapse * start:
        yield Event(row.path, "effective parameters", step, start, before, left, row.size)


def _of_attention(
    limits: Limits, path: str, at: int, step: int, first: Vitals, previous: Vitals, now: Vitals
) -> Iterator[Event]:
    start, before, logit = (float(one.attention.largest_logit[at]) for one in (first, previous, now))
    if logit >= limits.largest_logit:
        yield Event(path, "attention logit", step, start, before, logit, limits.largest_logit)
    start, before, entropy = (float(one.attention.entropy[at]) for one in (first, previous, now))
    limit = limits.entropy_collapse * start
    if entropy <= limit:
        yield Event(path, "attention entropy", step, start, before, entropy, limit)
