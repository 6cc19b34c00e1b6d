"""What a search found, as plain records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxeff.advice._interval import Rise
from jaxeff.prune import BeforeAndAfter, Sensitivity


@dataclasses.dataclass(frozen=True)
class Tried:
    """One point that the search measured.

    Attributes:
        what: 'weights' or 'units'.
        start: the allocation that it came from.
        criterion: by whose scores weights or units went; 'random' is the control.
        fraction: of the weights zeroed, or of the parameters removed with whole units.
        loss: the mean over the examples of the search; for `evaluate`, minus the score.
        bound: one standard error of the rise above that, which had to stay within the tolerance.
        searched: whether it is a step of the local search from that allocation.
    """

    what: str
    start: str
    criterion: str
    fraction: float
    loss: float
    bound: float
    searched: bool


@dataclasses.dataclass(frozen=True)
class Removal:
    """How much may go at once, and what it does to the loss.

    Attributes:
        what: 'weights', or 'units' for whole units, channels, heads and blocks.
        removed, total: numbers of them.
        criterion: by whose scores they go, the lowest first.
        start: the allocation from which the search set out.
        starts: the largest fraction that each allocation reached within the tolerance, by name.
        search_rise: how far the loss rose on the examples of the search; relative if `rise` is.
        rise: how far it rose on examples that the search did not see.
        kinds: removed and total by kind ('unit', 'channel', 'head', 'block'); empty for weights.
        measured: costs and times before and after, where the network gets smaller.
    """

    what: str
    removed: int
    total: int
    criterion: str
    start: str
    starts: Mapping[str, float]
    search_rise: float
    rise: Rise
    kinds: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    measured: BeforeAndAfter | None = None

    @property
    def fraction(self) -> float:
        return self.removed / self.total


@dataclasses.dataclass(frozen=True)
class LayerAdvice:
    """One layer, or one group of units.

    Attributes:
        path: of the layer, as in a report, or name of the group.
        kind: 'weights', or what the group's elements are.
        size: its weights, or its elements in all blocks.
        criterion: by whose scores they go.
        alone: the largest measured fraction of this layer alone within the tolerance; None if not measured.
        jointly: its fraction in the allocation of all together; None if there is none.
    """

    path: str
    kind: str
    size: int
    criterion: str
    alone: float | None
    jointly: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """All numbers of an `Advice`.

    Attributes:
        weights: what masks can zero; None if the search did not get there.
        units: what a smaller network can do without; None if nothing was found, with the reason in `notes`.
        layers: a record per layer and per group of units.
        sensitivity: losses of each layer pruned alone; None if not measured.
        reached: the largest fraction of the weights within the tolerance, by criterion; 'random' is the control.
        tried: every point that was measured with all layers together.
        dense: mean loss on the examples of the search with nothing removed; for `evaluate`, minus the score.
        tolerance: as given.
        by_score: whether `evaluate` was the measure.
        searched: examples of the search.
        held_out: examples that the search did not see; 0 if there were none.
        forwards: forward passes spent; a gradient counts three.
        seconds: wall time.
        interrupted: why the search ended early; None if it did not.
        notes: what readers must know.
    """

    weights: Removal | None
    units: Removal | None
    layers: tuple[LayerAdvice, ...]
    sensitivity: Sensitivity | None
    reached: Mapping[str, float]
    tried: tuple[Tried, ...]
    dense: float
    tolerance: float
    by_score: bool
    searched: int
    held_out: int
    forwards: int
    seconds: float
    interrupted: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, with None for numbers that are nan or infinite."""
        return _finite(self._plain())

    def _plain(self) -> dict[str, Any]:
        return {
            "weights": None if self.weights is None else _removal(self.weights),
            "units": None if self.units is None else _removal(self.units),
            "layers": self.to_records(),
            "reached": dict(self.reached),
            "tried": [dataclasses.asdict(point) for point in self.tried],
            **{name: getattr(self, name) for name in _PLAIN},
            "notes": list(self.notes),
        }

    def to_records(self) -> list[dict[str, Any]]:
        """Return a flat dict per layer and group, all with the same keys, for a DataFrame."""
        return [dataclasses.asdict(layer) for layer in self.layers]


_PLAIN = (
    "dense", "tolerance", "by_score", "searched", "held_out", "forwards", "seconds", "interrupted",
)  # fmt: skip


def _removal(removal: Removal) -> dict[str, Any]:
    plain = {
        field.name: getattr(removal, field.name)
        for field in dataclasses.fields(removal)
        if field.name not in ("rise", "measured", "kinds", "starts")
    }
    return {
        **plain,
        "fraction": removal.fraction,
        "starts": dict(removal.starts),
        "rise": dataclasses.asdict(removal.rise),
        "kinds": {kind: list(counts) for kind, counts in removal.kinds.items()},
        "measured": None if removal.measured is None else removal.measured.to_dict(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
