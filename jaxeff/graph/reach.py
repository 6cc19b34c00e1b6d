"""Values that a contraction's output becomes before the next contraction, and where a nonlinearity ends.

Values that are elementwise functions of the output are its images. Sums over images are statistics. A statistic per
unit (BatchNorm) leaves the values that it meets affine in each unit; any other normalizes across units and ends the
search.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

from jaxeff.graph import axes, nonlinearities
from jaxeff.graph.axes import Dims
from jaxeff.graph.flow import Flow
from jaxeff.graph.influence import Influences
from jaxeff.graph.program import Operation, Value
from jaxeff.graph.provenance import CONTRACTIONS


@dataclasses.dataclass(frozen=True)
class _Image:
    """A value that is an elementwise function of the contraction's output.

    `root` is the last value at which other data came in; there is none between root and here.
    """

    dims: Dims
    affine: bool
    root: Value


@dataclasses.dataclass(frozen=True)
class _Statistic:
    """A sum over the output's elements, and the nonlinear images that it sums.

    `per_unit` is True if each unit keeps its own (the mean of a BatchNorm in training), so that using
    it is affine in the unit. Otherwise it mixes units, and using it is a normalization.
    """

    dims: Dims
    per_unit: bool
    summed: frozenset[Value]


def _joined(statistics: Sequence[_Statistic], dims: Dims) -> _Statistic:
    per_unit = all(statistic.per_unit for statistic in statistics)
    return _Statistic(dims, per_unit, frozenset().union(*(statistic.summed for statistic in statistics)))


class Reach:
    """Everything that the output reaches by pointwise operations, up to contractions and normalizations."""

    def __init__(self, flow: Flow, influences: Influences, output: Value, dims: Dims, shape: tuple[int, ...]):
        self.flow = flow
        self.influences = influences
        self.least = influences.of(output)
        self.shape = shape
        self.images: dict[Value, _Image] = {output: _Image(dims, True, output)}
        self.partial: dict[Value, list[tuple[Value, axes.Part]]] = {}
        self.statistics: dict[Value, _Statistic] = {}
        self.normalized: set[Value] = set()
        self.normalizers: set[Value] = set()
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
        self.images = {value: image for value, image in self.images.items() if self._passed_on(value)}

    def _passed_on(self, value: Value) -> bool:
        """Return whether the network goes on with the value, rather than only with sums over it."""
        return self.influences.of(value).rank >= self.least.rank

    def first_nonlinearity(self) -> Value | None:
        """Return the first nonlinear image that is complete, and not just a step of a normalization."""
        for value in self.images:
            if self._stands(value):
                return self._last_step(value)
        return None

    def parts(self) -> list[tuple[Value, axes.Part]]:
        """Return the first values that together hold each unit once, if an affine image is split."""
        for found in self.partial.values():
            for chosen in (found, [piece for piece in found if self._whole(piece[0])]):
                axis = found[0][1].axis
                held = sorted(index for _, part in chosen if part.axis == axis for index in part.indices)
                if held == list(range(self.shape[axis])):
                    return chosen
        return []

    def _whole(self, value: Value) -> bool:
        return self.influences.of(value).whole >= self.least.whole

    def _stands(self, value: Value) -> bool:
        return not self.images[value].affine and value not in self.normalizers and self._complete(value)

    def _last_step(self, first: Value) -> Value:
        """Return the end of a nonlinearity of several steps (exp, add, divide: a sigmoid), else its first step.

        A later step counts if its name is known and nothing else reads the values between.
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
        """Return whether all readers of `first`, and of values made from it on the way, lead to `later`."""
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
            for operation in self.flow.carriers(value, self.influences)
            for output in operation.outputs
        )

    def _descends(self, value: Value, ancestor: Value) -> bool:
        return value is ancestor or any(self._descends(source, ancestor) for source in self._sources(value))

    def name(self, post: Value) -> str:
        """Return the catalog's name of the function from an affine image to `post`, trying the last image first."""
        constants = self.flow.program.constants
        for start in self._affine_starts(post):
            name = nonlinearities.recognize(
                self.flow.between(start, post, self.images.__contains__), start, post, constants
            )
            if name != "pointwise":
                return name
        return "pointwise"

    def _extend(self, operation: Operation) -> bool:
        """Classify an operation's output; return True if it is to be followed further."""
        if axes.moves(operation):
            return self._move(operation)
        if axes.reduced(operation) is not None or operation.name in axes.JOINING:
            return self._reduce(operation)
        if nonlinearities.pointwise(operation):
            return self._combine(operation)
        return self._pass_statistics(operation)

    def _move(self, operation: Operation) -> bool:
        source = operation.inputs[0]
        assert isinstance(source, Value)
        if source in self.normalized:
            self.normalized.update(operation.outputs)
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
        """Handle a reduction over dimensions or devices, or the collection of other devices' values for one."""
        reduced = axes.reduced(operation) or frozenset()
        summing = operation.name in ("reduce_sum", "psum", "psum_invariant", *axes.GATHERING)
        for source, result in zip(operation.inputs, operation.outputs, strict=True):
            if not isinstance(source, Value) or source not in self.images.keys() | self.statistics.keys():
                continue
            known = self.images.get(source) or self.statistics[source]
            dims = axes.gathered_from_devices(operation, known.dims, result.shape)
            across = axes.held(known.dims) - axes.held(dims) | axes.held(tuple(dims[i] for i in reduced))
            dims = tuple(dim for i, dim in enumerate(dims) if i not in reduced)
            per_unit = summing and not across
            if isinstance(known, _Statistic):
                per_unit, summed = per_unit and known.per_unit, known.summed
            else:
                summed = frozenset() if known.affine else frozenset({source})
            self.statistics[result] = _Statistic(dims, per_unit, summed)
        return any(result in self.statistics for result in operation.outputs)

    def _pass_statistics(self, operation: Operation) -> bool:
        """Handle moves and collections of statistics (stacked for one sum over devices), which are statistics too."""
        own = [self.statistics[x] for x in operation.inputs if isinstance(x, Value) and x in self.statistics]
        images = any(isinstance(x, Value) and x in self.images for x in operation.inputs)
        if not own or images or operation.bodies or operation.name in CONTRACTIONS:
            return False
        for result in operation.outputs:
            self.statistics[result] = _joined(own, axes.of_data(result.shape))
        return True

    def _combine(self, operation: Operation) -> bool:
        result = operation.outputs[0]
        operands = operation.inputs
        statistics = [self.statistics[x] for x in operands if isinstance(x, Value) and x in self.statistics]
        carried = [isinstance(x, Value) and x in self.images for x in operands]
        normalized = any(isinstance(x, Value) and x in self.normalized for x in operands)
        if not (normalized or any(carried) or statistics):
            return False
        if not normalized and not any(carried):
            return self._combine_statistics(operation, statistics)
        # A sum of the output that meets the output again normalizes it; the summed values are not activations.
        self.normalizers.update(*(statistic.summed for statistic in statistics))
        if normalized or not all(statistic.per_unit for statistic in statistics):
            self.normalized.add(result)
            return True
        return self._combine_images(operation, carried)

    def _combine_statistics(self, operation: Operation, statistics: list[_Statistic]) -> bool:
        result = operation.outputs[0]
        widest = max(statistics, key=lambda statistic: len(axes.held(statistic.dims)))
        dims = widest.dims if len(widest.dims) == len(result.shape) else axes.of_data(result.shape)
        self.statistics[result] = _joined(statistics, dims)
        return True

    def _combine_images(self, operation: Operation, carried: Sequence[bool]) -> bool:
        result = operation.outputs[0]
        pairs = zip(operation.inputs, carried, strict=True)
        carriers = [x for x, own in pairs if own and isinstance(x, Value)]
        images = [self.images[x] for x in carriers]
        dims = images[0].dims
        if any(image.dims != dims for image in images) or len(dims) != len(result.shape):
            return False
        if any(x.shape != result.shape for x in carriers):
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
        """Return False for an intermediate step, such as the sigmoid in x * sigmoid(x).

        A step is completed by a later image of the same root that takes both an earlier value and the step (or a value
        made from it).
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
        """Return the affine images through each of which alone `post` depends on the output, the last first."""
        needed = {post}
        while needed:
            latest = max(needed, key=lambda value: self.flow.made_by.get(value, -1))
            if len(needed) == 1 and self.images[latest].affine:
                yield latest
            needed = (needed - {latest}) | self._sources(latest)
