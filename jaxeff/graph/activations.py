"""What a unit emits: from the output of a contraction to its pre- and post-activation.

The pre-activation is the contraction's output with its own bias. The post-activation is the first
nonlinearity that it reaches through pointwise operations: bias, the affine part of a norm, dropout,
adding or gating with other data. Where a reduction, another contraction or a normalisation across
units comes first, the pre-activation stands for both. A fused layer whose output is split (the gates of
a recurrent cell, a gated linear unit) is followed part by part. Imports `program`, `axes`, `nonlinearities`,
`provenance`.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.axes import Dims, Factor
from jaxeff.graph.program import Operation, Program, Value
from jaxeff.graph.provenance import Lost, Provenance, value_shape


@dataclasses.dataclass(frozen=True, eq=False)
class Emission:
    """What some of a weight's units emit.

    Attributes:
        value: the post-activation.
        dims: where the weight's axes stand in it.
        shape: the weight's, where these units alone stand along `axis`.
        axis: of the weight, along which these units are some of many; None for all units.
        indices: of these units along it.
        nonlinearity: its name.
    """

    value: Value
    dims: Dims
    shape: tuple[int, ...]
    axis: int | None
    indices: tuple[int, ...]
    nonlinearity: str


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """Values before and after the nonlinearity, with the weight's axes in their dimensions.

    `post` has one emission, or several that hold each unit once; their names are joined by '/'.
    """

    pre: Value
    pre_dims: Dims
    post: tuple[Emission, ...]
    bias: int | None

    @property
    def nonlinearity(self) -> str:
        return "/".join(dict.fromkeys(emission.nonlinearity for emission in self.post))


class Flow:
    """Which operations read and make each value of one program, in execution order."""

    def __init__(self, program: Program, provenance: Provenance):
        self.program = program
        self.provenance = provenance
        self.outputs = {output for output in program.outputs if isinstance(output, Value)}
        self.made_by: dict[Value, int] = {}
        self.read_by: dict[Value, list[int]] = {}
        for index, operation in enumerate(program.operations):
            for operand in operation.inputs:
                if isinstance(operand, Value):
                    self.read_by.setdefault(operand, []).append(index)
            self.made_by.update(dict.fromkeys(operation.outputs, index))

    def readers(self, value: Value) -> list[Operation]:
        return [self.program.operations[index] for index in self.read_by.get(value, ())]

    def between(self, start: Value, end: Value, of_start: Callable[[Value], bool]) -> list[Operation]:
        """The operations that make `end` from `start`, constants included, in execution order.

        Args:
            of_start: whether a value is made of `start`.
        """
        wanted: set[int] = set()
        pending = [end]
        while pending:
            value = pending.pop()
            made = self.made_by.get(value)
            if value is start or made is None or made in wanted:
                continue
            if not of_start(value) and value not in self.provenance.constants:
                continue
            wanted.add(made)
            pending.extend(x for x in self.program.operations[made].inputs if isinstance(x, Value))
        return [self.program.operations[index] for index in sorted(wanted)]


def follow(flow: Flow, output: Value, dims: Dims, shapes: Sequence[tuple[int, ...]], leaf: int) -> Activation:
    """Find the pre- and post-activation of a contraction's output.

    Args:
        output: what the contraction makes; `dims` says where the weight's axes stand in it.
        shapes: of all leaves, to tell a bias (one number a unit) from other additions.
        leaf: the weight's index among them.
    """
    pre, pre_dims, bias = _add_bias(flow, output, dims, shapes, leaf)
    post = _emissions(flow, output, dims, shapes[leaf])
    if all(emission.nonlinearity == "identity" for emission in post):
        post = [Emission(pre, pre_dims, shapes[leaf], None, (), "identity")]
    return Activation(pre, pre_dims, tuple(post), bias)


def _emissions(flow: Flow, output: Value, dims: Dims, shape: tuple[int, ...]) -> list[Emission]:
    """What the units emit: together where they reach a nonlinearity together, else part by part."""
    reach = _Reach(flow, output, dims, shape)
    post = reach.first_nonlinearity()
    if post is not None:
        return [Emission(post, reach.images[post].dims, shape, None, (), reach.name(post))]
    parts = reach.parts()
    if not parts:
        return [Emission(output, dims, shape, None, (), "identity")]
    return [emission for value, part in parts for emission in _emissions_of_part(flow, value, part)]


def _emissions_of_part(flow: Flow, value: Value, part: axes.Part) -> list[Emission]:
    found = _emissions(flow, value, part.dims, part.shape)
    if any(emission.axis not in (None, part.axis) for emission in found):
        found = [Emission(value, part.dims, part.shape, None, (), "identity")]
    return [
        dataclasses.replace(
            emission,
            axis=part.axis,
            indices=tuple(part.indices[i] for i in emission.indices) if emission.indices else part.indices,
        )
        for emission in found
    ]


def _add_bias(
    flow: Flow, output: Value, dims: Dims, shapes: Sequence[tuple[int, ...]], leaf: int
) -> tuple[Value, Dims, int | None]:
    value, here = output, dims
    while True:
        readers = flow.readers(value)
        if len(readers) != 1 or value in flow.outputs:
            return output, dims, None
        operation = readers[0]
        bias = _bias_of(flow, operation, value, here, shapes, leaf)
        if bias is not None:
            return operation.outputs[0], here, bias
        moved = _moved(operation, here)
        if moved is None:
            return output, dims, None
        value, here = operation.outputs[0], moved


def _moved(operation: Operation, dims: Dims) -> Dims | None:
    if axes.moves(operation) and len(operation.outputs) == 1:
        return axes.move(operation, dims, value_shape(operation.inputs[0]))[0]
    return dims if nonlinearities.unchanged(operation) else None


def _bias_of(
    flow: Flow,
    operation: Operation,
    value: Value,
    dims: Dims,
    shapes: Sequence[tuple[int, ...]],
    leaf: int,
) -> int | None:
    """The leaf that `operation` adds to `value`, if it has one number for each unit and no more."""
    if operation.name not in ("add", "add_any") or operation.outputs[0].shape != value.shape:
        return None
    other = operation.inputs[1] if operation.inputs[0] is value else operation.inputs[0]
    units = math.prod(shapes[leaf][axis] for axis in axes.held(dims))
    for candidate, where in flow.provenance.holds(other).items():
        if isinstance(where, Lost) or not _one_a_unit(flow, candidate, where, shapes[candidate], units):
            continue
        seen = axes.broadcast(where, value_shape(other), value.shape)
        if all(_aligned(theirs, mine) for theirs, mine in zip(seen, dims, strict=True)):
            return candidate
    return None


def _one_a_unit(flow: Flow, leaf: int, dims: Dims, shape: tuple[int, ...], units: int) -> bool:
    """Whether the leaf holds one number for each unit, layers that a scan stacks apart."""
    here = axes.held(dims)
    scanned = {axis for (_, other), axis in flow.provenance.scanned.items() if other == leaf}
    whole = all(axis in here or axis in scanned for axis, size in enumerate(shape) if size > 1)
    return whole and math.prod(shape[axis] for axis in here) == units


def _aligned(theirs: tuple[Factor, ...], mine: tuple[Factor, ...]) -> bool:
    """Whether a bias and a weight's units stand at the same places of one dimension."""
    bias, units = [f for f in theirs if f.axis is not None], [f for f in mine if f.axis is not None]
    return math.prod(f.size for f in bias) == math.prod(f.size for f in units) and (
        [f.offset for f in bias if f.offset] == [f.offset for f in units if f.offset]
    )


@dataclasses.dataclass(frozen=True)
class _Image:
    """A value that is, element for element, a function of the contraction's output.

    `root` is the last value at which other data came in: between root and here there is none.
    """

    dims: Dims
    affine: bool
    root: Value


@dataclasses.dataclass(frozen=True)
class _Statistic:
    """A sum over the output's elements, and the nonlinear images that it sums.

    `per_unit` is True where each unit keeps its own (the mean of a BatchNorm in training): using
    it is affine in the unit. Otherwise it mixes units, and using it is a normalisation.
    """

    dims: Dims
    per_unit: bool
    summed: frozenset[Value]


class _Reach:
    """Everything the output reaches by pointwise operations, up to contractions and normalisations."""

    def __init__(self, flow: Flow, output: Value, dims: Dims, shape: tuple[int, ...]):
        self.flow = flow
        self.shape = shape
        self.images: dict[Value, _Image] = {output: _Image(dims, True, output)}
        self.partial: dict[Value, list[tuple[Value, axes.Part]]] = {}
        self.statistics: dict[Value, _Statistic] = {}
        self.normalised: set[Value] = set()
        self.normalisers: set[Value] = set()
        # In execution order, so that all operands of an operation are known when it is visited.
        pending = sorted(set(flow.read_by.get(output, ())))
        seen = set(pending)
        while pending:
            operation = flow.program.operations[heapq.heappop(pending)]
            if self._extend(operation):
                readers = {index for value in operation.outputs for index in flow.read_by.get(value, ())}
                for index in readers - seen:
                    seen.add(index)
                    heapq.heappush(pending, index)

    def first_nonlinearity(self) -> Value | None:
        """The first nonlinear image that is complete, and no mere step of a normalisation."""
        for value in self.images:
            if self._stands(value):
                return self._last_step(value)
        return None

    def parts(self) -> list[tuple[Value, axes.Part]]:
        """The first values that together hold each unit once, where an affine image is split."""
        for found in self.partial.values():
            axis = found[0][1].axis
            held = sorted(index for _, part in found if part.axis == axis for index in part.indices)
            if held == list(range(self.shape[axis])):
                return found
        return []

    def _stands(self, value: Value) -> bool:
        return not self.images[value].affine and value not in self.normalisers and self._complete(value)

    def _last_step(self, first: Value) -> Value:
        """The end of a nonlinearity of several steps (exp, add, divide: a sigmoid), else its first step.

        A later step counts where its name is known and nothing else reads what lies between.
        """
        last = first
        for later, image in self.images.items():
            if (
                image.root is self.images[first].root
                and self._stands(later)
                and self._only_through(first, later)
            ):
                last = last if self.name(later) in ("pointwise", "identity") else later
        return last

    def _only_through(self, first: Value, later: Value) -> bool:
        """Whether whatever reads `first`, or what comes of it on the way, does so to make `later`."""
        between, pending = set(), [later]
        while pending:
            value = pending.pop()
            if value is not first and value not in between:
                between.add(value)
                pending.extend(self._sources(value))
        descended = {first} | {value for value in between if self._descends(value, first)}
        return later in descended and all(
            output in between
            for value in descended - {later}
            for operation in self.flow.readers(value)
            for output in operation.outputs
        )

    def _descends(self, value: Value, ancestor: Value) -> bool:
        return value is ancestor or any(self._descends(source, ancestor) for source in self._sources(value))

    def name(self, post: Value) -> str:
        """The catalogue's name of what lies between an affine image and `post`, from the last one back."""
        constants = self.flow.program.constants
        for start in self._affine_starts(post):
            name = nonlinearities.recognise(
                self.flow.between(start, post, self.images.__contains__), start, post, constants
            )
            if name != "pointwise":
                return name
        return "pointwise"

    def _extend(self, operation: Operation) -> bool:
        """Classify an operation's output; True where it is to be followed further."""
        if axes.moves(operation):
            return self._move(operation)
        if operation.name.startswith("reduce_") and "axes" in operation.params:
            return self._reduce(operation)
        if nonlinearities.pointwise(operation):
            return self._combine(operation)
        return False

    def _move(self, operation: Operation) -> bool:
        source = operation.inputs[0]
        assert isinstance(source, Value)
        if source in self.normalised:
            self.normalised.update(operation.outputs)
            return True
        if source not in self.images and source not in self.statistics:
            return False
        known = self.images.get(source) or self.statistics[source]
        moved = axes.move(operation, known.dims, source.shape)
        for result, dims in zip(operation.outputs, moved, strict=True):
            if isinstance(known, _Statistic):
                self.statistics[result] = dataclasses.replace(known, dims=dims or axes.of_data(result.shape))
            elif dims is not None and axes.covers(dims, axes.held(known.dims), self.shape):
                self.images[result] = dataclasses.replace(known, dims=dims)
            elif dims is not None and known.affine:
                self._divide(source, result, dims, axes.held(known.dims))
        return True

    def _divide(self, source: Value, result: Value, dims: Dims, held: frozenset[int]) -> None:
        part = axes.part(dims, held, self.shape)
        if part is not None:
            self.partial.setdefault(source, []).append((result, part))

    def _reduce(self, operation: Operation) -> bool:
        source, result = operation.inputs[0], operation.outputs[0]
        assert isinstance(source, Value)
        if source not in self.images and source not in self.statistics:
            return False
        known = self.images.get(source) or self.statistics[source]
        reduced = {int(axis) for axis in operation.params["axes"]}
        dims = tuple(dim for i, dim in enumerate(known.dims) if i not in reduced)
        across = axes.held(tuple(known.dims[axis] for axis in reduced))
        per_unit = operation.name == "reduce_sum" and not across
        if isinstance(known, _Statistic):
            per_unit, summed = per_unit and known.per_unit, known.summed
        else:
            summed = frozenset() if known.affine else frozenset({source})
        self.statistics[result] = _Statistic(dims, per_unit, summed)
        return True

    def _combine(self, operation: Operation) -> bool:
        result = operation.outputs[0]
        operands = operation.inputs
        statistics = [self.statistics[x] for x in operands if isinstance(x, Value) and x in self.statistics]
        carried = [isinstance(x, Value) and x in self.images for x in operands]
        normalised = any(isinstance(x, Value) and x in self.normalised for x in operands)
        if not (normalised or any(carried) or statistics):
            return False
        if not normalised and not any(carried):
            return self._combine_statistics(operation, statistics)
        # A sum of the output that meets the output again normalises it; what it sums is no activation.
        self.normalisers.update(*(statistic.summed for statistic in statistics))
        if normalised or not all(statistic.per_unit for statistic in statistics):
            self.normalised.add(result)
            return True
        return self._combine_images(operation, carried)

    def _combine_statistics(self, operation: Operation, statistics: list[_Statistic]) -> bool:
        result = operation.outputs[0]
        widest = max(statistics, key=lambda statistic: len(axes.held(statistic.dims)))
        dims = widest.dims if len(widest.dims) == len(result.shape) else axes.of_data(result.shape)
        self.statistics[result] = _Statistic(
            dims,
            all(statistic.per_unit for statistic in statistics),
            frozenset().union(*(statistic.summed for statistic in statistics)),
        )
        return True

    def _combine_images(self, operation: Operation, carried: Sequence[bool]) -> bool:
        result = operation.outputs[0]
        images = [self.images[x] for x, own in zip(operation.inputs, carried, strict=True) if own]  # pyright: ignore
        dims = images[0].dims
        if any(image.dims != dims for image in images) or len(dims) != len(result.shape):
            return False
        if any(x.shape != result.shape for x, own in zip(operation.inputs, carried, strict=True) if own):  # pyright: ignore
            return False
        foreign = any(
            not own and self.flow.provenance.is_data(x)
            for x, own in zip(operation.inputs, carried, strict=True)
        )
        roots = {image.root for image in images}
        root = result if foreign else max(roots, key=lambda value: self.flow.made_by.get(value, -1))
        affine = all(image.affine for image in images) and nonlinearities.affine(operation.name, carried)
        self.images[result] = _Image(dims, affine, root)
        return True

    def _complete(self, value: Value) -> bool:
        """False for a step on the way, such as the sigmoid in x * sigmoid(x).

        A step is completed by a later image of the same root that takes both the step (or what
        came of it) and an earlier value.
        """
        root = self.images[value].root
        descended = {value}
        for later, image in self.images.items():
            if image.root is not root or later is value:
                continue
            sources = self._sources(later)
            if sources & descended:
                if sources - descended:
                    return False
                descended.add(later)
        return True

    def _sources(self, value: Value) -> set[Value]:
        made = self.flow.made_by.get(value)
        if made is None:
            return set()
        operation = self.flow.program.operations[made]
        return {x for x in operation.inputs if isinstance(x, Value) and x in self.images}

    def _affine_starts(self, post: Value) -> Iterator[Value]:
        """The affine images through each of which alone `post` depends on the output, the last first."""
        needed = {post}
        while needed:
            latest = max(needed, key=lambda value: self.flow.made_by.get(value, -1))
            if len(needed) == 1 and self.images[latest].affine:
                yield latest
            needed = (needed - {latest}) | self._sources(latest)
