"""How much of what units emit changes from example to example; what does not, the next bias can take over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxeff import graph
from jaxeff.graph.plain_biases import plain_bias
from jaxeff.model.adapters import resolve_both
from jaxeff.model.apply import Model, from_apply
from jaxeff.model.params import Params
from jaxeff.numerics.meshes import by_compiler
from jaxeff.numerics.precision import widened
from jaxeff.output.shown import Shown
from jaxeff.output.stacks import folded_cells
from jaxeff.output.text import aligned
from jaxeff.prune._dead import removable
from jaxeff.prune._grouping import groups
from jaxeff.prune._groups import Group, reduced
from jaxeff.prune._matrices import rebuilt
from jaxeff.prune._plans import Plan
from jaxeff.statistics import deviations
from jaxeff.statistics.deviations import Deviations
from jaxeff.statistics.observe import trace


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads units: what its inputs were on the batch.

    Attributes:
        mean: of each input, in the layout of the weight, with size 1 on its other axes.
        axes: of the weight that are neither outputs nor stacked layers.
        bias: path of the bias that is added to its outputs as it is, and used nowhere else; None if there is none.
    """

    mean: np.ndarray
    axes: tuple[int, ...]
    bias: str | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fluctuation(Shown):
    """What `prune.fluctuation` returns.

    Attributes:
        importance: by group, [*blocks, size], for `prune.plan`.
        constant: by group the elements that emit the same on all of the batch, for `Plan.of`; of stacked blocks
            equally many of each block.
        skipped: by group of units, why nothing is known of it.
        readers: by path, the `Reader` of each weight whose inputs are known.
    """

    importance: Mapping[str, np.ndarray]
    constant: Mapping[str, np.ndarray]
    skipped: Mapping[str, str]
    readers: Mapping[str, Reader]

    def compensated(self, params: Any, plan: Plan) -> Any:
        """Return params whose biases hold what the plan's units give to the layers that read them, on average.

        b_j + sum of mean(x_i) W_ij over the inputs i that go. Make the network smaller after that: `prune.shrink` or
        `prune.compact` of these params. The outputs without constant units are then those with them, up to the rounding
        of the bias.

        Raises:
            ValueError: a layer that reads what goes has no bias of its own that is added to its outputs as it is; the
                plan is of another model, or removes from groups that were not scored.
        """
        plan.check(params)
        self._check(plan)
        named = Params.of(params).named
        added: dict[str, Any] = {}
        for path, removed in self._removed(plan).items():
            reader = self.readers[path]
            lost = np.where(removed, reader.mean, 0)
            if not lost.any():
                continue
            if reader.bias is None:
                raise ValueError(
                    f"{path!r} reads what the plan removes, and has no bias of its own that is added to its outputs as "
                    "it is: leave these groups out of the plan, remove only what emits 0 (`prune.Plan.dead`), or do "
                    "without `compensated`"
                )
            weight, bias = named[path], named[reader.bias]
            change = by_compiler(functools.partial(_change, reader.axes, lost), weight, like=bias)
            added[reader.bias] = change.reshape(jnp.shape(bias))
        changed = {path: (named[path] + change).astype(named[path].dtype) for path, change in added.items()}
        return rebuilt(params, changed, lambda leaf: leaf)

    def _check(self, plan: Plan) -> None:
        for group in plan.groups:
            own, shape = self.importance.get(group.name), (*group.blocks, group.size)
            if own is None:
                why = self.skipped.get(group.name, "no such group")
                raise ValueError(
                    f"`plan` removes from {group.name!r}, which `prune.fluctuation` did not score: {why}. Leave it out "
                    "of the plan, and remove it in a second one"
                )
            if own.shape != shape:
                raise ValueError(
                    f"`plan` is of another model: {group.name!r} has elements {own.shape} here, and {shape} there"
                )

    def _removed(self, plan: Plan) -> dict[str, np.ndarray]:
        """By path of a reader, True where an input goes, in the layout of the weight."""
        found = {}
        for path, axes in plan.gone().items():
            read = self.readers[path].axes if path in self.readers else ()
            if gone := [each for axis, each in axes.items() if axis in read]:
                found[path] = functools.reduce(np.logical_or, gone)
        return found

    def __str__(self) -> str:
        rows = [
            (
                name,
                " x ".join(map(str, each.shape)),
                f"{each.min():.3g} to {each.max():.3g}",
                str(np.size(self.constant.get(name, ()))),
            )
            for name, each in self.importance.items()
        ]
        lines = aligned([_HEADER, *folded_cells(rows)], left=("group", "size"), gap=2)
        return "\n".join([*lines, *(f"Not scored: {name} ({why})" for name, why in self.skipped.items())])


_ROUNDINGS = 8
_HEADER = ("group", "size", "importance", "constant")


def fluctuation(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    allow: Iterable[str] = (),
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Fluctuation:
    """Return how much of what each unit gives to the next layers changes over the batch (FLAP).

    The importance of a unit is the sum of var(x_i) sum_j W_ij^2 over the inputs x_i that carry it and all weights W
    that read them. With the mean of x_i in the bias, which `Fluctuation.compensated` puts there, this is the squared
    error that removing the unit causes, summed over outputs and averaged over examples, if inputs are uncorrelated.

    A unit is constant if every layer that reads it receives the same value on the whole batch. Removed and compensated,
    it changes the outputs there by rounding alone. If a convolution that pads its input or spreads it apart reads it,
    only a unit that emits 0 counts: zeros stand beside it. What is constant on few examples need not be so on others:
    pass as many as stand for the data.

    Args:
        params, apply_fn, batch, allow, rngs, apply_kwargs: as in `prune.groups`.

    Raises:
        ValueError: the inputs of a weight are not finite, or the batch holds one value of each unit.

    References:
        An, Zhao, Yu, Tang and Wang, Fluctuation-based Adaptive Structured Pruning for Large Language Models, 2023,
        arXiv:2312.11983, equation 5. FLAP scores the inputs of a block's last layers alone, and standardizes the
        scores of each layer.

    >>> from jaxeff import prune
    >>> model = lambda w, x: jax.nn.relu(x @ w["a"] + w["b"]) @ w["c"] + w["d"]
    >>> w = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[0.0, 3.0]])}
    >>> w |= {"c": jnp.array([[1.0], [2.0]]), "d": jnp.zeros((1, 1))}
    >>> x = jnp.array([[1.0], [2.0]])
    >>> found = fluctuation(w, model, x)
    >>> print(found)
    group  size  importance  constant
    ---------------------------------
    a:1    2      0 to 0.25         1
    >>> plan = prune.Plan.of(prune.groups(w, model, x), found.constant)
    >>> small = prune.shrink(found.compensated(w, plan), plan)
    >>> small["d"].item(), bool((model(small, x) == model(w, x)).all())
    (6.0, True)
    """
    params, apply_fn, batch = resolve_both(params, apply_fn, batch)
    known = groups(params, apply_fn, batch, allow=allow, rngs=rngs, **apply_kwargs)
    inputs = _inputs(from_apply(Params.of(params), apply_fn, batch, rngs, apply_kwargs))
    scores = {path: each.score for path, each in inputs.read.items()}
    varies = {path: each.varies for path, each in inputs.read.items()}
    importance, constant, skipped = {}, {}, {}
    for group in known.unlocked:
        reading = inputs.readers_of(group)
        if isinstance(reading, str):
            skipped[group.name] = reading
            continue
        importance[group.name] = reduced(reading, scores, "sum")
        still = np.asarray(reduced(reading, varies, "max")).reshape(-1, group.size) == 0
        if np.size(elements := removable(still).reshape(*group.blocks, -1)):
            constant[group.name] = elements
    return Fluctuation(
        importance, constant, skipped, {path: each.reader for path, each in inputs.read.items()}
    )


class _Read(NamedTuple):
    """What a weight reads, in the layout of the weight, with size 1 along its outputs.

    Attributes:
        score: var(x) sum W^2 of each input.
        varies: whether what the input gives to the outputs may change.
    """

    reader: Reader
    score: np.ndarray
    varies: np.ndarray


class _Inputs(NamedTuple):
    """What is known of weights by path.

    Attributes:
        units: axes of the outputs.
        read: of those whose inputs are known.
        unknown: why they are not.
    """

    units: Mapping[str, frozenset[int]]
    read: Mapping[str, _Read]
    unknown: Mapping[str, str]

    def readers_of(self, group: Group) -> Group | str:
        """Return the group with only those members that read its elements, or why they are not known."""
        if group.kind == "block":
            return "its elements are whole blocks, which `prune.block_influence` scores"
        if group.routed:
            return "its elements are experts, which `prune.expert_importance` scores"
        readers = []
        for member in group.members:
            path, axis = member.path, member.axis
            if path in self.read and axis in self.read[path].reader.axes:
                readers.append(member)
            elif path in self.unknown and axis not in self.units.get(path, ()):
                return f"{path!r} reads it, and {self.unknown[path]}"
        return (
            dataclasses.replace(group, members=tuple(readers)) if readers else "no weight is known to read it"
        )


def _inputs(model: Model) -> _Inputs:
    found, _ = trace(model.function.without_capture(), model.paths, model.origins, model.params, model.inputs)
    sites: dict[str, list[graph.Site]] = {}
    for site in found.sites:
        sites.setdefault(found.leaves[site.leaf].path, []).append(site)
    unknown = {found.leaves[leaf].path: why for leaf, why in found.unpaired.items()}
    unknown |= {path: why for path, uses in sites.items() if (why := _refusal(uses))}
    uses = [site for site in found.sites if found.leaves[site.leaf].path not in unknown]
    by_value: dict[Any, list[graph.Site]] = {}
    for site in uses:
        by_value.setdefault(site.input, []).append(site)

    @jax.jit
    def run(arguments: Any) -> list[Deviations]:
        reductions = {
            value: functools.partial(_reduce, found.leaves, those) for value, those in by_value.items()
        }
        hooks = graph.Hooks(
            reductions, lambda first, second: [a + b for a, b in zip(first, second, strict=True)]
        )
        _, observed = graph.evaluate(found.program, arguments, hooks)
        return [
            deviations.over_iterations(observed[site.input][by_value[site.input].index(site)], site.loops)
            for site in uses
        ]

    seen: dict[str, Deviations] = {}
    for site, one in zip(uses, run(jax.tree.leaves((model.params, model.inputs))), strict=True):
        path = found.leaves[site.leaf].path
        seen[path] = seen[path] + one if path in seen else one
    if seen and max(float(one.count.max()) for one in seen.values()) <= 1:
        raise ValueError(
            "`batch` holds one value of each unit, by which all of them are constant: pass more examples"
        )
    unknown |= {path: "did not run on this batch" for path, one in seen.items() if not one.count.all()}
    read = {
        path: _read(found, sites[path], model.named[path], one)
        for path, one in seen.items()
        if path not in unknown
    }
    return _Inputs({path: those[0].unit_axes for path, those in sites.items()}, read, unknown)


def _refusal(uses: Sequence[graph.Site]) -> str | None:
    """Why the inputs of a weight with these uses are not read."""
    site = uses[0]
    if all(use.kind == "embedding" for use in uses):
        return "its rows are looked up"
    if len({(use.unit_axes, use.activation.bias, use.kind) for use in uses}) > 1:
        return "is used in different ways"
    if any(jnp.issubdtype(use.input.dtype, jnp.complexfloating) for use in uses):
        return "its inputs are complex"
    if site.groups > 1:
        return "it is a grouped convolution"
    if site.input_axes & site.unit_axes:
        return "it is several products side by side"
    return (
        None if site.direct else "the operation takes what is made of it, and not the weight as it is stored"
    )


def _reduce(leaves: Sequence[graph.Leaf], sites: Sequence[graph.Site], array: jax.Array) -> list[Deviations]:
    return [deviations.of_inputs(site, leaves[site.leaf].shape, array) for site in sites]


def _read(found: graph.Graph, sites: Sequence[graph.Site], weight: Any, seen: Deviations) -> _Read:
    site, rounding = sites[0], _ROUNDINGS * float(jnp.finfo(seen.mean.dtype).eps)
    mean, variance = (np.asarray(each, np.float64) for each in (seen.mean, seen.variance))
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise ValueError(
            f"the inputs of {found.leaves[site.leaf].path!r} are not finite on this batch: leave out examples with nan "
            "or infinity, or check `params`"
        )
    units, stacked = tuple(site.unit_axes), {loop.axis for loop in site.loops}
    axes = tuple(axis for axis in range(weight.ndim) if axis not in units and axis not in stacked)
    squares = np.asarray(by_compiler(lambda w: jnp.sum(jnp.square(widened(w)), units, keepdims=True), weight))
    # What is the same but for rounding, such as a constant that a softmax weighs, is constant.
    moves = variance > np.square(rounding * mean)
    varies = (moves | ((mean != 0) & _meets_zeros(found, site))) & (squares > 0)
    bias = plain_bias(found, sites)
    reader = Reader(mean, axes, None if bias is None else found.leaves[bias].path)
    return _Read(reader, variance * squares, varies)


def _meets_zeros(found: graph.Graph, site: graph.Site) -> bool:
    """Return whether a convolution puts zeros beside its inputs or between them."""
    operations = [use.operation for use in found.provenance.uses if use.leaf == site.leaf]
    return any(
        any(map(any, operation.params["padding"]))
        or any(size > 1 for size in operation.params["lhs_dilation"])
        for operation in operations
        if operation is not None and operation.name == "conv_general_dilated"
    )


def _change(axes: tuple[int, ...], lost: np.ndarray, weight: jax.Array) -> jax.Array:
    """What inputs of these values give to the outputs, summed over all other axes."""
    return jnp.sum(lost * widened(weight), axes)
