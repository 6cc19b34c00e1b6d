"""Advice as users hold it: the numbers, and the masks, plan and report that belong to them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from jaxeff.advice import _table as table
from jaxeff.advice._records import Findings
from jaxeff.prune import Plan
from jaxeff.report import Recommendation, Report


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Advice(Findings):
    """What `jaxeff.advise` measured. `str(advice)` is a headline, a table and recommendations.

    Attributes:
        masks: for `prune.apply`, True = kept; None if no weights can be zeroed.
        plan: for `prune.compact` and `prune.shrink`; None if no units can be removed.
        analyze: makes `report`.
    """

    masks: Any
    plan: Plan | None
    analyze: Callable[[], Report]

    @functools.cached_property
    def report(self) -> Report:
        """The report of the same model and statistics, made when first asked for."""
        return self.analyze()

    def headline(self) -> str:
        """Return what can go at once, and what it costs, in two sentences."""
        return table.headline(self)

    def recommendations(self) -> tuple[Recommendation, ...]:
        """Return at most seven recommendations, each with the measurements it rests on."""
        return table.recommendations(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """Return all numbers as JSON without NaN literals; the plan has a `to_json` of its own."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)

    def __str__(self) -> str:
        return table.render(self)

    def __repr__(self) -> str:
        return table.render(self)

    def _repr_html_(self) -> str:
        return table.html(self)
