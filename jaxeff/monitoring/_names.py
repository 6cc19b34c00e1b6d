"""The numbers of a check under flat names, as trackers take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxeff.monitoring._records import LeafLayout, Norms, SpectralRanks, Vitals
from jaxeff.report import Report
from jaxeff.report._scalars import chosen

USUAL = (
    "gradients/norm",
    "gradients/nonfinite",
    "params/norm",
    "params/nonfinite",
    "updates/norm",
    "updates/ratio",
    "activations/dead_units",
    "activations/dormant_units",
    "activations/zero_fraction",
    "activations/crest_factor",
    "attention/largest_logit",
    "attention/entropy",
    "attention/lowest_entropy",
    "spectra/effective_rank",
    "spectra/stable_rank",
)
"""What is worth a chart. Those that a step does not have are left out."""


def scalars(
    leaves: Sequence[LeafLayout],
    vitals: Vitals,
    report: Report,
    ranks: SpectralRanks | None,
    patterns: tuple[str, ...],
) -> dict[str, float]:
    """Return the usual numbers of a check, or all whose names match one of the patterns.

    Args:
        vitals, report, ranks: on the host.
    """
    every = dict(_every(leaves, vitals, report))
    return chosen(every | dict(_ranks(ranks)), patterns, USUAL)


def _every(leaves: Sequence[LeafLayout], vitals: Vitals, report: Report) -> Iterator[tuple[str, float]]:
    parts = modules(leaves)
    params, updates = _norms(vitals.params, parts), _norms(vitals.updates, parts)
    yield from _named("params/norm", params)
    yield from _named("params/nonfinite", _counts(vitals.params, parts))
    if was_passed(vitals.gradients):
        yield from _named("gradients/norm", _norms(vitals.gradients, parts))
        yield from _named("gradients/nonfinite", _counts(vitals.gradients, parts))
    if was_passed(vitals.updates):
        yield from _named("updates/norm", updates)
        yield from _named("updates/nonfinite", _counts(vitals.updates, parts))
        yield from _named("updates/ratio", {name: ratio(updates[name], params[name]) for name in params})
    yield from _activations(vitals, report)
    yield from _attention(vitals, report)


def modules(leaves: Sequence[LeafLayout]) -> dict[str, list[int]]:
    """Return the parts of the norms that belong to each module, '' being the model, and to each leaf.

    Where all leaves of a module stack equally many blocks, each block has an entry of its own, named 'module[3]'.
    """
    inside: dict[str, list[tuple[LeafLayout, int]]] = {}
    first = 0
    for leaf in leaves:
        keys = leaf.path.split("/")
        for count in range(len(keys) + 1):
            inside.setdefault("/".join(keys[:count]), []).append((leaf, first))
        first += len(leaf.blocks)
    found: dict[str, list[int]] = {}
    for module, members in inside.items():
        found[module] = [start + at for leaf, start in members for at in range(len(leaf.blocks))]
        blocks = {leaf.blocks for leaf, _ in members}
        if len(blocks) == 1 and blocks != {("",)}:
            found |= {
                f"{module}{name}": [start + at for _, start in members]
                for at, name in enumerate(blocks.pop())
            }
    return found


def was_passed(norms: Norms) -> bool:
    return bool(np.all(norms.nonfinite >= 0))


def ratio(updates: float, params: float) -> float:
    """Return |update| / |params|; infinite if only the params are 0, nan if both are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(updates) / np.float64(params))


def _norms(norms: Norms, parts: dict[str, list[int]]) -> dict[str, float]:
    squares = np.square(np.asarray(norms.norm, np.float64))
    return {name: float(np.sqrt(squares[at].sum())) for name, at in parts.items()}


def _counts(norms: Norms, parts: dict[str, list[int]]) -> dict[str, float]:
    return {name: float(np.sum(norms.nonfinite[at])) for name, at in parts.items()}


def _named(quantity: str, values: dict[str, float]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        yield f"{quantity}/{name}" if name else quantity, value


def _activations(vitals: Vitals, report: Report) -> Iterator[tuple[str, float]]:
    found, rows = vitals.activations, report.structure
    read = [at for at in range(len(rows)) if not np.isnan(found.dead[at])]
    if not read:
        return
    units = [rows[at].unit_count for at in read]
    yield "activations/dead_units", float(np.sum(found.dead[read]))
    yield "activations/dormant_units", float(np.sum(found.dormant[read]))
    yield "activations/zero_fraction", float(np.average(found.zero_fraction[read], weights=units))
    yield "activations/crest_factor", float(np.max(found.crest_factor[read]))
    for at in read:
        path = rows[at].path
        yield f"activations/dead_units/{path}", float(found.dead[at])
        yield f"activations/dormant_units/{path}", float(found.dormant[at])
        yield f"activations/zero_fraction/{path}", float(found.zero_fraction[at])
        yield f"activations/crest_factor/{path}", float(found.crest_factor[at])


def _attention(vitals: Vitals, report: Report) -> Iterator[tuple[str, float]]:
    found, paths = vitals.attention, attention_paths(report)
    if not paths:
        return
    heads = [one.heads for one in report.attentions for _ in range(_stacked(one.entropy))]
    yield "attention/largest_logit", float(np.max(found.largest_logit))
    yield "attention/entropy", float(np.average(found.entropy, weights=heads))
    yield "attention/lowest_entropy", float(np.min(found.lowest_entropy))
    for at, path in enumerate(paths):
        yield f"attention/largest_logit/{path}", float(found.largest_logit[at])
        yield f"attention/entropy/{path}", float(found.entropy[at])
        yield f"attention/lowest_entropy/{path}", float(found.lowest_entropy[at])


def _ranks(ranks: SpectralRanks | None) -> Iterator[tuple[str, float]]:
    if ranks is None:
        return
    for quantity in ("effective_rank", "stable_rank"):
        values = getattr(ranks, quantity)
        known = values[np.isfinite(values)]
        yield f"spectra/{quantity}", float(np.mean(known)) if known.size else float("nan")
        for path, value in zip(ranks.paths, values, strict=True):
            yield f"spectra/{quantity}/{path}", float(value)


def attention_paths(report: Report) -> list[str]:
    """Return the path of each attention, with an index where a scan stacks several."""
    return [
        f"{one.path}[{','.join(map(str, index))}]" if index else one.path
        for one in report.attentions
        for index in np.ndindex(np.shape(one.entropy)[:-1])
    ]


def _stacked(entropy: Any) -> int:
    return int(np.prod(np.shape(entropy)[:-1], dtype=int))
