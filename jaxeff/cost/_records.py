"""The result of a count: `Cost`, made of `Entry` and `Statement`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxeff.cost._work import Work, amounts
from jaxeff.output import text
from jaxeff.output.shown import Shown
from jaxeff.output.stacks import rows_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """Work of one operator in one module for the whole batch; an operation on a weight has an entry of its own.

    Attributes:
        phase: 'forward', 'backward' or 'optimizer'.
        module: path of the innermost module around it; '' for the model itself.
        path: of the weight that it consumes; None if it consumes none.
        operator: name of the primitive.
        runs: number of runs of operators of this entry, iterations of loops included.
        work: of all runs, on all devices.
        per_device: work of one device; None if XLA decides how the work is divided.
    """

    phase: str
    module: str
    path: str | None
    operator: str
    runs: int
    work: Work
    per_device: Work | None


@dataclasses.dataclass(frozen=True)
class Statement:
    """Something that a count leaves out or assumes.

    Attributes:
        phase, module: as in `Entry`.
        kind: 'uncounted' if the count leaves out the operator; 'assumed' if the count holds only under the
            condition in `reason`.
        operator: name of the primitive.
        reason: in words.
        runs: number of runs.
    """

    phase: str
    kind: str
    operator: str
    module: str
    reason: str
    runs: int

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.operator} ({self.runs:,} x {self.phase}{where}) {self.kind}: {self.reason}."


@dataclasses.dataclass(frozen=True, repr=False)
class Cost(Shown):
    """Operations of a program. `str(cost)` is a table as wide as the terminal, up to 100 columns.

    Every number is for the whole batch, except `per_example`.

    Attributes:
        entries: work of each operator in each module, in execution order.
        statements: what was not counted, and what was assumed.
        batch_size: examples in the batch; None if the batch has no leading axis.
        devices: number of devices that the program is written for.
    """

    entries: tuple[Entry, ...]
    statements: tuple[Statement, ...]
    batch_size: int | None
    devices: int

    @property
    def total(self) -> Work:
        """All phases together, on all devices."""
        return _sum(entry.work for entry in self.entries)

    @property
    def macs(self) -> int:
        return self.total.macs

    @property
    def flops(self) -> int:
        return self.total.flops

    @property
    def per_example(self) -> Work | None:
        """The total over `batch_size`; None if that is unknown."""
        return None if self.batch_size is None else self.total / self.batch_size

    @property
    def per_device(self) -> Work | None:
        """Work of one device; None if XLA decides how the work is divided (see `jaxeff.cost.compiled`)."""
        parts = [entry.per_device for entry in self.entries]
        return None if None in parts else _sum(part for part in parts if part is not None)

    @property
    def complete(self) -> bool:
        """Whether nothing was left out and nothing assumed."""
        return not self.statements

    @property
    def uncounted(self) -> dict[str, int]:
        """Operators that are not counted, and their numbers of runs."""
        found: dict[str, int] = {}
        for statement in self.statements:
            if statement.kind == "uncounted":
                found[statement.operator] = found.get(statement.operator, 0) + statement.runs
        return found

    @property
    def phases(self) -> dict[str, Work]:
        """By phase: 'forward', and on request 'backward' and 'optimizer'."""
        return self._by(lambda entry: [entry.phase])

    @property
    def operators(self) -> dict[str, Work]:
        """By primitive, largest first."""
        return _sorted(self._by(lambda entry: [entry.operator]))

    @property
    def layers(self) -> dict[str, Work]:
        """The operations that consume each weight, by its path, in execution order.

        In the backward pass, also the operations that make its gradient, if module names identify them (as in Linen).
        """
        return self._by(lambda entry: [] if entry.path is None else [entry.path])

    @property
    def modules(self) -> dict[str, Work]:
        """All operations in each module and its submodules, by path; '' is the model."""
        return self._by(lambda entry: _enclosing(entry.module))

    @property
    def sites(self) -> tuple[Entry, ...]:
        """The entries of operations that consume a weight, one each."""
        return tuple(entry for entry in self.entries if entry.path is not None)

    def phase(self, name: str) -> Cost:
        """Return the cost of one phase.

        Raises:
            ValueError: the phase was not counted.
        """
        if name not in self.phases:
            raise ValueError(f"`name` must be one of {', '.join(self.phases)}, got {name!r}")
        return dataclasses.replace(
            self,
            entries=tuple(entry for entry in self.entries if entry.phase == name),
            statements=tuple(statement for statement in self.statements if statement.phase == name),
        )

    def __str__(self) -> str:
        return _render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data: the totals, each breakdown of them, and every statement."""
        return {
            "batch_size": self.batch_size,
            "devices": self.devices,
            "total": _plain(self.total),
            "per_example": _plain(self.per_example),
            "per_device": _plain(self.per_device),
            **{
                name: {key: _plain(work) for key, work in getattr(self, name).items()}
                for name in ("phases", "operators", "modules", "layers")
            },
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "statements": [dataclasses.asdict(statement) for statement in self.statements],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _by(self, keys: Callable[[Entry], Iterable[str]]) -> dict[str, Work]:
        found: dict[str, Work] = {}
        for entry in self.entries:
            for key in keys(entry):
                found[key] = found.get(key, Work()) + entry.work
        return found


def _enclosing(module: str) -> Iterator[str]:
    yield ""
    parts = module.split("/") if module else []
    for depth in range(len(parts)):
        yield "/".join(parts[: depth + 1])


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _sorted(works: dict[str, Work]) -> dict[str, Work]:
    return dict(sorted(works.items(), key=lambda item: item[1].weight, reverse=True))


def _plain(work: Work | None) -> dict[str, Any] | None:
    return None if work is None else dataclasses.asdict(work)


# Operators below this share of the total share one row.
_SHOWN = 0.0005
_COLUMNS = ("MACs", "FLOPs", "transc.", "share")


def _render(cost: Cost) -> str:
    """Render the totals, a row per layer, a row per operator, and what was not counted."""
    width = text.terminal_width()
    lines = [*text.wrapped(_headline(cost), width), ""]
    share = cost.total.weight
    if cost.layers:
        layers = _of_blocks(cost.layers)
        lines += text.aligned([("layer", *_COLUMNS), *_cells(layers, share)], width)
        if len(layers) < len(cost.layers):
            lines += text.wrapped("(A row of several blocks holds their sum; `cost.layers` has each.)", width)
        lines.append("")
    lines += text.aligned([("operator", *_COLUMNS), *_cells(_with_rest(cost.operators, share), share)], width)
    if cost.statements:
        lines += text.section(width, "Not in these numbers, or assumed:", _merged(cost))
    return "\n".join(lines)


def _headline(cost: Cost) -> str:
    total = cost.total
    each = cost.per_example
    batch = f" for a batch of {cost.batch_size:,}" if cost.batch_size is not None else ""
    parts = [f"{amounts(total)}{batch}"]
    if each is not None and cost.batch_size != 1:
        parts.append(f"{amounts(each)} per example")
    if len(cost.phases) > 1:
        parts += [f"{phase} {amounts(work)}" for phase, work in cost.phases.items()]
    if cost.devices > 1:
        share = cost.per_device
        known = "divided as XLA decides" if share is None else f"{amounts(share)} on each"
        parts.append(f"{cost.devices:,} devices, {known}")
    if total.padding_macs:
        parts.append(f"{text.percent(total.padding_macs / total.macs)} of the MACs meet padding")
    return "; ".join(parts) + "."


def _cells(works: dict[str, Work], whole: int) -> list[tuple[str, ...]]:
    return [
        (
            name,
            text.number(work.macs),
            text.number(work.flops),
            text.number(work.transcendentals),
            text.percent(work.weight / whole) if whole else text.UNKNOWN,
        )
        for name, work in works.items()
    ]


def _of_blocks(works: dict[str, Work]) -> dict[str, Work]:
    """Add up the layers of a deep model that differ only in the number of their block."""
    names = [*works]
    found = {}
    for stack in rows_of([(name, (work.macs, work.flops)) for name, work in works.items()]):
        first, *others = (works[names[index]] for index in stack.members)
        found[stack.part(range(len(stack.members)))] = sum(others, first)
    return found


def _with_rest(works: dict[str, Work], whole: int) -> dict[str, Work]:
    shown = {name: work for name, work in works.items() if work.weight >= _SHOWN * whole and work.weight}
    rest = [work for name, work in works.items() if name not in shown and work.weight]
    return {**shown, f"({len(rest)} more)": sum(rest[1:], rest[0])} if rest else shown


def _merged(cost: Cost) -> list[str]:
    """Return one sentence per operator and reason, for all modules together."""
    runs: dict[tuple[str, str, str, str], int] = {}
    for found in cost.statements:
        key = found.phase, found.operator, found.kind, found.reason
        runs[key] = runs.get(key, 0) + found.runs
    return [
        f"{operator} ({count:,} x {phase}), {kind}: {reason}."
        for (phase, operator, kind, reason), count in runs.items()
    ]
