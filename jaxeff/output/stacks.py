"""Layers that differ only in a number of their path: the blocks of a deep model, stacked by a scan or unrolled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

FEWEST = 3
"""Layers that form a stack; two blocks are shorter than what would say that they were folded."""
PLAIN = 20
"""Rows of a table that fits a screen, and is not folded."""
_NUMBER = re.compile(r"\d+")


class Row(Protocol):
    """What a layer has to agree in with the others of its stack."""

    @property
    def path(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def nonlinearity(self) -> str | None: ...


class Stack(NamedTuple):
    """Layers that are alike but for one number in their path.

    Attributes:
        before, after: what their paths have before and after the number.
        members: index of each layer among the rows, in the order of their numbers.
        numbers: the number in the path of each; none for a single layer.
    """

    before: str
    after: str
    members: tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def path(self) -> str:
        """The path with '*' for the number, such as 'block*/attention/query/kernel'."""
        return f"{self.before}*{self.after}" if self.numbers else self.before

    @property
    def label(self) -> str:
        """The path with the first and the last number, such as 'block0–11/attention/query/kernel'."""
        ends = f"{self.numbers[0]}–{self.numbers[-1]}" if self.numbers else ""
        return f"{self.before}{ends}{self.after}"

    def part(self, places: Sequence[int]) -> str:
        """Return the path with the numbers of some members, such as 'block0–2,5/attention/query/kernel'.

        >>> Stack("block", "/kernel", (0, 1, 2, 3), (0, 1, 2, 5)).part([0, 1, 3])
        'block0–1,5/kernel'
        """
        numbers = runs([self.numbers[place] for place in places]) if self.numbers else ""
        return f"{self.before}{numbers}{self.after}"


def runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers, with a dash for those in a row.

    >>> runs([0, 1, 2, 5])
    '0–2,5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found)


def stacks(rows: Sequence[Row]) -> list[Stack]:
    """Return the stacks of at least three layers, in the order of their first layers.

    Layers of a stack agree in shape, dtype, kind and nonlinearity.
    """
    return _stacks([named(row) for row in rows])


def alone(path: str, index: int) -> Stack:
    """Return the stack of a single layer."""
    return Stack(path, "", (index,), ())


def named(row: Row) -> tuple[str, Hashable]:
    """Return a layer's path, and the facts in which it agrees with the others of its stack."""
    return row.path, (row.shape, row.dtype, row.kind, row.nonlinearity)


def rows_of(layers: Sequence[tuple[str, Hashable]], blocks: bool = False) -> list[Stack]:
    """Return what each row of a table holds: a stack if there are more than 20 layers, or else a single layer.

    Args:
        layers: as in `folded`.
        blocks: whether each layer has a row of its own, however many there are.
    """
    if blocks or len(layers) <= PLAIN:
        return [alone(path, place) for place, (path, _) in enumerate(layers)]
    return folded(layers)


def folded_cells(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows of a table, where blocks whose cells are the same but for their names share one.

    >>> rows = [(f"block{i}/up", "16 to 8") for i in range(24)]
    >>> folded_cells([*rows, ("head", "9 to 8")])
    [('block0–23/up', '16 to 8'), ('head', '9 to 8')]
    """
    stacks = rows_of([(row[0], row[1:]) for row in rows])
    return [(stack.part(range(len(stack.members))), *rows[stack.members[0]][1:]) for stack in stacks]


def explained(rows: Sequence[Stack], holds: str, table: str) -> list[str]:
    """Return the sentence that explains rows of several layers; nothing if there are none.

    Args:
        holds: what such a row shows.
        table: the call that gives each block a row of its own.
    """
    several = [stack for stack in rows if len(stack.members) > 1]
    if not several:
        return []
    hold = "1 row holds" if len(several) == 1 else f"{len(several)} rows hold"
    return [
        f"({hold} {sum(len(stack.members) for stack in several):,} layers of stacked blocks: {holds}. "
        f"`{table}`, or `--by block`, has a row for each.)"
    ]


def folded(rows: Sequence[tuple[str, Hashable]]) -> list[Stack]:
    """Return the stacks of at least three layers, each at the place of its first, and every other layer alone.

    Where a path has several numbers, the first that gives a stack counts: 'block3/Dense_1/kernel' belongs to
    'block*/Dense_1/kernel'.

    Args:
        rows: the path of each layer, and the facts in which the layers of a stack agree.

    >>> [stack.label for stack in folded([("b0/w", 8), ("out", 8), ("b1/w", 8), ("b2/w", 8)])]
    ['b0–2/w', 'out']
    """
    found = _stacks(rows)
    first = {min(stack.members): stack for stack in found}
    inside = {place for stack in found for place in stack.members}
    return [
        first[place] if place in first else alone(path, place)
        for place, (path, _) in enumerate(rows)
        if place in first or place not in inside
    ]


def _stacks(rows: Sequence[tuple[str, Hashable]]) -> list[Stack]:
    candidates = [list(_candidates(*row)) for row in rows]
    counts = Counter(key for keys in candidates for key, _ in keys)
    found: dict[_Key, list[tuple[int, int]]] = {}
    for index, keys in enumerate(candidates):
        for key, number in keys:
            if counts[key] >= FEWEST:
                found.setdefault(key, []).append((number, index))
                break
    # Fewer are left where layers went to another stack, by a number further left.
    return [_stack(key, sorted(pairs)) for key, pairs in found.items() if len(pairs) >= FEWEST]


_Key = tuple[str, str, Hashable]


def _candidates(path: str, alike: Hashable) -> Iterator[tuple[_Key, int]]:
    """Return for each number of a path what is around it, with the facts in which a stack agrees."""
    for number in _NUMBER.finditer(path):
        yield (path[: number.start()], path[number.end() :], alike), int(number[0])


def _stack(key: _Key, pairs: Sequence[tuple[int, int]]) -> Stack:
    numbers, members = zip(*pairs, strict=True)
    return Stack(key[0], key[1], members, numbers)
