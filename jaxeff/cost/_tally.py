"""Walks a program and tallies the work of its operations: the entries and statements of a `Cost`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr

from jaxeff.cost._operations import work_of
from jaxeff.cost._records import Entry, Statement
from jaxeff.cost._work import Work
from jaxeff.graph import Program, flatten
from jaxeff.graph.program import Operation, Value

Owner = Callable[[Operation, str], str | None]
"""Returns the path of the weight that an operation consumes, given the module that contains it."""


@dataclasses.dataclass
class Tally:
    """Running totals of one phase.

    Attributes:
        works: (module, weight, operator, index of the site) -> work of all runs, work of one device, and runs.
        statements: (kind, operator, module, reason) -> runs.
        devices: maximum number of devices that any part of the program is written for.
        split: whether the work of one device is known throughout.
    """

    phase: str
    works: dict[tuple[str, str | None, str, int], list[Any]] = dataclasses.field(default_factory=dict)
    statements: dict[tuple[str, str, str, str], int] = dataclasses.field(default_factory=dict)
    devices: int = 1
    split: bool = True

    def add(self, key: tuple[str, str | None, str, int], work: Work, runs: int, shards: int) -> None:
        known = self.works.setdefault(key, [Work(), Work(), 0])
        known[0], known[1], known[2] = known[0] + work, known[1] + work / shards, known[2] + runs

    def state(self, kind: str, operator: str, module: str, reason: str, runs: int) -> None:
        key = kind, operator, module, reason
        self.statements[key] = self.statements.get(key, 0) + runs

    def join(self, other: Tally) -> None:
        for key, (whole, device, runs) in other.works.items():
            known = self.works.setdefault(key, [Work(), Work(), 0])
            known[0], known[1], known[2] = known[0] + whole, known[1] + device, known[2] + runs
        for key, runs in other.statements.items():
            self.statements[key] = self.statements.get(key, 0) + runs
        self.devices = max(self.devices, other.devices)
        self.split = self.split and other.split

    @property
    def total(self) -> Work:
        return sum((whole for whole, _, _ in self.works.values()), Work())

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(
            Entry(self.phase, module, path, operator, runs, whole, device if self.split else None)
            for (module, path, operator, _), (whole, device, runs) in self.works.items()
        )

    @property
    def said(self) -> tuple[Statement, ...]:
        return tuple(Statement(self.phase, *key, runs) for key, runs in self.statements.items())


@dataclasses.dataclass(frozen=True)
class Around:
    """The context of an operation.

    Attributes:
        owner: returns the weight that an operation consumes.
        modules: returns the path of the module that contains an operation.
        numbers: running indices of the sites.
        runs: how often the surrounding loops run it.
        devices: number of devices that run it, each with its own arrays.
    """

    owner: Owner
    modules: _Modules
    numbers: Iterator[int]
    runs: int = 1
    devices: int = 1


def tally(program: Program, phase: str, owner: Owner, root: str) -> Tally:
    """Count a program and the bodies of its loops.

    Args:
        owner: returns the weight that an operation consumes.
        root: name of the outermost module, which is left out of the modules' paths.
    """
    found = Tally(phase)
    _walk(program, Around(owner, _Modules(root), itertools.count(1)), found)
    return found


class _Modules:
    """Paths of modules by scope, each computed once."""

    def __init__(self, root: str):
        self._root = root
        self._known: dict[str, str] = {}

    def __call__(self, operation: Operation) -> str:
        scope = operation.scope
        if scope not in self._known:
            self._known[scope] = module_path(scope, self._root)
        return self._known[scope]


_WRAPPER = re.compile(r"\w+\(|\)")
_OF_JAX = frozenset({"", "checkpoint", "rematted_computation", "while", "body", "cond", "closed_call"})


def module_path(scope: str, root: str) -> str:
    """Return the path of a module from the scopes of an operation, as it begins the paths of the module's weights.

    >>> module_path("transpose(jvp(MLP))/block_0.encode/block_0/Dense_0/...qhd,...khd->...hqk", "MLP")
    'block_0/Dense_0'
    """
    found: list[str] = []
    after_method = False
    for part in _WRAPPER.sub("", scope).split("/"):
        name, method, _ = part.partition(".")
        # A module names its methods 'block.encode', and may then name itself again.
        repeated = after_method and found[-1:] == [name]
        if part in _OF_JAX or "->" in part or repeated:
            continue
        found.append(name)
        after_method = bool(method)
    return "/".join(found[1:] if root and found[:1] == [root] else found)


def _walk(program: Program, around: Around, found: Tally) -> None:
    for operation in program.operations:
        module = around.modules(operation)
        enter = _ENTERED.get(operation.name)
        if enter is not None:
            enter(operation, module, around, found)
        else:
            _count(operation, module, around, found)


def _count(operation: Operation, module: str, around: Around, found: Tally) -> None:
    work = work_of(operation)
    if isinstance(work, str):
        found.state("uncounted", operation.name, module, work, around.runs * around.devices)
        return
    if operation.name.startswith("ragged_dot"):
        found.state("assumed", operation.name, module, "every row belongs to a group", around.runs)
    if not any(work.numbers):
        return
    path = around.owner(operation, module)
    key = module, path, operation.name, 0 if path is None else next(around.numbers)
    if around.devices > 1:
        found.add(key, work * (around.runs * around.devices), around.runs, around.devices)
        return
    shards, devices = _shards(operation)
    found.devices = max(found.devices, devices)
    found.add(key, work * around.runs, around.runs, shards)


def _shards(operation: Operation) -> tuple[int, int]:
    """Return how many parts an operation's arrays are divided into, and how many devices run it.

    Types say so only under explicit sharding; otherwise XLA decides.
    """
    sizes: dict[str, int] = {}
    devices = 1
    for value in (*operation.inputs, *operation.outputs):
        sharding = value.sharding if isinstance(value, Value) else None
        if sharding is None:
            continue
        devices = max(devices, sharding.mesh.size)
        for names in sharding.spec:
            for name in (names,) if isinstance(names, str) else names or ():
                sizes[name] = sharding.mesh.shape[name]
    return math.prod(sizes.values()), devices


def _scan(operation: Operation, _: str, around: Around, found: Tally) -> None:
    length = operation.params["length"]
    if length:
        _walk(operation.bodies[0], dataclasses.replace(around, runs=around.runs * length), found)


def _while(operation: Operation, module: str, around: Around, found: Tally) -> None:
    once = Tally(found.phase)
    for body in operation.bodies:
        _walk(body, around, once)
    each = once.total
    reason = (
        "how often it runs depends on values: one iteration is counted, of "
        f"{each.macs // around.runs:,} MACs and {each.flops // around.runs:,} FLOPs"
    )
    found.state("assumed", operation.name, module, reason, around.runs)
    found.join(once)


def _cond(operation: Operation, module: str, around: Around, found: Tally) -> None:
    branches = [Tally(found.phase) for _ in operation.bodies]
    for body, branch in zip(operation.bodies, branches, strict=True):
        _walk(body, around, branch)
    largest = max(branches, key=lambda branch: branch.total.weight)
    flops = sorted((branch.total.flops // around.runs for branch in branches), reverse=True)
    if flops[0] or any(branch.statements for branch in branches):
        each = " and ".join([", ".join(f"{count:,}" for count in flops[:-1]), f"{flops[-1]:,}"])
        reason = f"counted as the largest of its branches, which have {each} FLOPs"
        found.state("assumed", operation.name, module, reason, around.runs)
    for branch in branches:
        if branch is not largest:
            # Operations that cannot be counted are reported for every branch.
            branch.works.clear()
        found.join(branch)


def _shard_map(operation: Operation, _: str, around: Around, found: Tally) -> None:
    params = operation.params
    mesh = params["mesh"]
    # The name of the parameter has changed between JAX versions.
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    devices = math.prod(mesh.shape[name] for name in manual)
    found.devices = max(found.devices, mesh.size)
    if around.devices * devices != mesh.size:
        found.split = False  # The axes left to XLA may divide the body further.
    body = flatten(_closed(params["jaxpr"]), operation.scope)
    _walk(body, dataclasses.replace(around, devices=around.devices * devices), found)


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


_ENTERED: Mapping[str, Callable[..., None]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
