"""The role of each leaf of `params` in the program: whether it is a weight, and what its axes index.

It comes from a program, or from statistics, which know their program; without either, from names and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core.meta import AxisMetadata
from jax import Array

from jaxeff.model import apply as models
from jaxeff.model.adapters import resolve
from jaxeff.model.params import Params, is_variables, named_leaves
from jaxeff.model.roles import BIASES, last_name, role_of
from jaxeff.output import text
from jaxeff.output.stacks import folded_cells
from jaxeff.statistics import SiteStatistics, Statistics, check_params
from jaxeff.statistics.observe import observe

_NOT_PRUNED = (*BIASES, "embedding")


@dataclasses.dataclass(frozen=True)
class Axes:
    """Meaning of the axes of a weight.

    An axis may be among both inputs and units: the axis over the members of a batched product, each of which has
    inputs and units of its own.

    Attributes:
        inputs: axes that a product sums over; None if the weight's products sum over different axes.
        units: axes of the weight's outputs; None if its uses have different ones.
        layers: axes that a scan runs over, where each index is a layer.
    """

    inputs: tuple[int, ...] | None = ()
    units: tuple[int, ...] | None = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("inputs", "units"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    @property
    def of_layer(self) -> Axes:
        """Return the axes of a single layer."""

        def within(axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
            return axes and tuple(axis - sum(layer < axis for layer in self.layers) for axis in axes)

        return Axes(within(self.inputs), within(self.units))


class Scores(struct.PyTreeNode, AxisMetadata[Any]):
    """The scores of one weight with the meaning of its axes, in a box like Flax's `nn.Partitioned`.

    NumPy and JAX read it as the array that it holds. `flax.linen.unbox` removes the boxes of a tree.
    """

    value: Any
    axes: Axes = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.value)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.value)

    def __getitem__(self, index: Any) -> Array:
        return self.value[index]

    def __jax_array__(self) -> Array:
        return jnp.asarray(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        found = jax.device_get(self.value)
        return found if dtype is None else found.astype(dtype)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> Any:
        raise TypeError("`Scores` are not parameters: make them from parameters that already have their axes")

    def remove_axis(self, index: int, params: Any) -> Any:
        return self.add_axis(index, params)


def is_scores(node: Any) -> bool:
    return isinstance(node, Scores)


def unboxed(tree: Any) -> Any:
    """Remove the boxes of `Scores` from a tree."""
    return jax.tree.map(lambda node: node.value if is_scores(node) else node, tree, is_leaf=is_scores)


def by_path(importance: Any) -> dict[str, Any]:
    """The leaves of scores by path; those of the `params` collection of variables by their path below it."""
    named = named_leaves(importance)
    above = "params/" if is_variables(importance) else ""
    return {path.removeprefix(above): leaf for path, leaf in named.items()}


def axes_of(tree: Any) -> list[Axes | None]:
    """Return the axes of each leaf of the unboxed tree; None if it was in no box."""
    return [node.axes if is_scores(node) else None for node in jax.tree.leaves(tree, is_leaf=is_scores)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The role of one leaf.

    Attributes:
        role: 'weight' or another role: 'bias', 'scale', 'vector', ...
        axes: of a weight; None if they are unknown.
        prunable: whether it may be pruned.
        reason: why, in words.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    axes: Axes | None
    prunable: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Layout(Mapping[str, Leaf]):
    """The role of each leaf, by path. `str(layout)` is a table.

    Pass it as `prunable` wherever that is an argument, or as the `axes` of a pattern.

    Attributes:
        leaves: in the order of the params.
        stacked: paths under which layers were assumed to be stacked because of their shapes alone.
    """

    leaves: tuple[Leaf, ...]
    stacked: tuple[str, ...] = ()

    @functools.cached_property
    def _by_path(self) -> dict[str, Leaf]:
        return {leaf.path: leaf for leaf in self.leaves}

    def __getitem__(self, path: str) -> Leaf:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.leaves)

    def __str__(self) -> str:
        header = ("leaf", "shape", "is", "pruned", "layers", "why")
        rows = []
        for leaf in self.leaves:
            layers = math.prod(leaf.shape[axis] for axis in leaf.axes.layers) if leaf.axes else 1
            may = "yes" if leaf.prunable else "no"
            rows.append((leaf.path, str(leaf.shape), leaf.role, may, str(layers), leaf.reason))
        rows = folded_cells(rows)
        names = text.shorten([name for name, *_ in rows], text.WIDTH // 3)
        rows = [(name, *cells) for name, (_, *cells) in zip(names, rows, strict=True)]
        return "\n".join(text.aligned([header, *rows], left=header))


def layout(
    params: Any,
    apply_fn: Callable | Any = None,
    batch: Any = None,
    *,
    prunable: Mapping[str, bool] | None = None,
    rngs: Any = None,
    **apply_kwargs: Any,
) -> Layout:
    """Describe the role of each leaf of `params`, from the program, which is only traced, or by names and shapes.

    Args:
        params, apply_fn, batch: as in `jaxeff.analyze`.
        prunable: exceptions by path.
        rngs, **apply_kwargs: passed to `apply_fn`.

    Returns:
        A `Layout`, for the `prunable` of `prune.scored`, `prune.sparsify`, the recipes and others, and for the
        `axes` of `prune.NByM` and `prune.Units`.

    Raises:
        TypeError: `apply_kwargs` come without an `apply_fn`.
        ValueError: `prunable` names an unknown leaf, or `batch` is missing.

    >>> def model(params, x):
    ...     step = lambda x, layer: (jax.nn.relu(x * layer["norm"][None] @ layer["q"]), None)
    ...     return jax.lax.scan(step, x, params["blocks"])[0]
    >>> params = {"blocks": {"norm": jnp.ones((3, 4)), "q": jnp.ones((3, 4, 4))}}
    >>> found = layout(params, model, jnp.ones((2, 4)))
    >>> [(leaf.path, leaf.role, leaf.prunable) for leaf in found.leaves]
    [('blocks/norm', 'scale', False), ('blocks/q', 'weight', True)]
    >>> found["blocks/q"].axes
    Axes(inputs=(1,), units=(2,), layers=(0,))
    """
    params, apply_fn, batch = resolve(params, apply_fn, batch, rngs, apply_kwargs)
    params = Params.of(params)
    named = params.named
    if apply_fn is None:
        found = by_shape(named)
    elif batch is None:
        raise ValueError("`batch` is missing: the program is traced with a batch of the model's input")
    else:
        found = of_model(models.from_apply(params, apply_fn, batch, rngs, apply_kwargs))
    exceptions = dict(prunable or {})
    check_named(exceptions, named)
    leaves = [
        dataclasses.replace(leaf, prunable=exceptions[leaf.path], reason="as `prunable` says")
        if leaf.path in exceptions
        else leaf
        for leaf in found.leaves
    ]
    return dataclasses.replace(found, leaves=tuple(leaves))


def check_named(exceptions: Mapping[str, bool], named: Mapping[str, Any]) -> None:
    if unknown := exceptions.keys() - named.keys():
        raise ValueError(f"`prunable` names {sorted(unknown)[0]!r}, which is not a leaf: {', '.join(named)}")


def of_model(model: models.Model) -> Layout:
    """Return the layout of a program."""
    arguments = model.function, model.paths, model.origins, model.batch_size, model.params, model.inputs
    return of_statistics(observe.eval_shape(*arguments), model.named)


def of_statistics(statistics: Statistics, named: Mapping[str, Any]) -> Layout:
    """Return the layout of the program from which the statistics come, which are those of these leaves.

    Raises:
        TypeError, ValueError: they are not.
    """
    check_params(statistics, named)
    infos = {info.path: info for info in statistics.params}
    sites = _uses(statistics)
    leaves = []
    for path, leaf in named.items():
        info, uses = infos[path], sites.get(path)
        axes = None if uses is None else _axes_of_uses(uses)
        layers = axes.layers if axes else ()
        weight = info.role == "weight" and info.shape != ()
        prunable = weight and is_prunable(path, leaf)
        if weight and not prunable:
            reason = "by its name" if last_name(path) in _NOT_PRUNED else "one axis"
        else:
            reason = info.reason or (f"used as {uses[0].kind}" if uses else "by its use")
        if layers:
            reason += f", stacked along axis {', '.join(map(str, layers))}"
        leaves.append(Leaf(path, info.shape, info.role, axes, prunable, reason))
    return Layout(tuple(leaves))


def _uses(statistics: Statistics) -> dict[str, list[SiteStatistics]]:
    found: dict[str, list[SiteStatistics]] = {}
    for site in statistics.sites:
        found.setdefault(site.path, []).append(site)
    return found


def _axes_of_uses(uses: Sequence[SiteStatistics]) -> Axes:
    # A look-up sums over nothing. If an embedding is also multiplied (`attend`), the inputs are those of the products.
    products = [site for site in uses if site.kind != "embedding"] or uses
    return Axes(
        _only({site.input_axes for site in products}),
        _only({site.unit_axes for site in uses}),
        uses[0].layer_axes,
    )


def _only(found: set[tuple[int, ...]]) -> tuple[int, ...] | None:
    return next(iter(found)) if len(found) == 1 else None


def is_prunable(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a floating array of two axes or more that is not a bias, scale or embedding."""
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return floating and jnp.ndim(leaf) > 1 and last_name(path) not in _NOT_PRUNED


def by_shape(named: Mapping[str, Any]) -> Layout:
    """Return the layout that names and shapes suggest.

    Layers are assumed to be stacked under a path if all floating arrays there have two axes or more, share their
    first size, and some have two axes and others more: they are as many matrices as vectors.
    """
    shapes = {
        path: tuple(jnp.shape(leaf))
        for path, leaf in named.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    stacked = tuple(_stacks(shapes))
    leaves = []
    for path, leaf in named.items():
        shape, name = tuple(jnp.shape(leaf)), last_name(path)
        inside = path in shapes and any(_under(path, top) for top in stacked)
        axes = None
        role = role_of(path, shape, jnp.result_type(leaf), layers=int(inside))
        if path not in shapes:
            reason = "by its dtype"
        elif name in _NOT_PRUNED:
            role, reason = name, "by its name"
        elif role == "empty":
            reason = "it has no elements"
        elif role == "vector":
            reason = f"one axis in each of {shape[0]} layers" if inside else "one axis"
        else:
            reason = f"{shape[0]} layers stacked" if inside else "two axes or more"
            axes = _guessed(name, shape, 1) if inside else None
        leaves.append(Leaf(path, shape, role, axes, role == "weight", reason))
    return Layout(tuple(leaves), stacked)


def _guessed(name: str, shape: tuple[int, ...], layers: int) -> Axes:
    """Assume Flax's layout for a kernel of two axes, inputs first; for other leaves only the axis of layers."""
    if name == "kernel" and len(shape) == layers + 2:
        return Axes((layers,), (layers + 1,), tuple(range(layers)))
    return Axes(layers=tuple(range(layers)))


def assumed(path: str, shape: tuple[int, ...]) -> Axes:
    """Return the axes of a weight without a program."""
    return _guessed(last_name(path), shape, 0)


AxesByPath = Layout | Statistics | Mapping[str, Axes | Leaf] | tuple[tuple[str, Axes], ...]
"""Types of the argument `axes` of a pattern."""


def axes_by_path(given: AxesByPath) -> tuple[tuple[str, Axes], ...]:
    """Return `axes` as pairs, so that equal patterns are equal and hashable."""
    if isinstance(given, Statistics):
        given = {path: _axes_of_uses(uses) for path, uses in _uses(given).items()}
    if isinstance(given, Mapping):
        axes = [(path, one.axes if isinstance(one, Leaf) else one) for path, one in sorted(given.items())]
        given = tuple((path, one) for path, one in axes if one is not None)
    if not isinstance(given, tuple) or not all(isinstance(one, Axes) for _, one in given):
        raise TypeError(
            "`axes` must be a layout from `prune.layout(params, apply_fn, batch)`, `prune.Axes` by path, or "
            f"statistics from `jaxeff.collect`, got {given!r}"
        )
    return given


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the outermost paths under which layers are stacked; '' for all."""
    ranks: dict[str, set[int]] = {}
    sizes: dict[str, set[int]] = {}
    for path, shape in shapes.items():
        keys = path.split("/")
        for depth in range(len(keys)):
            top = "/".join(keys[:depth])
            ranks.setdefault(top, set()).add(min(len(shape), 3))
            sizes.setdefault(top, set()).update(shape[:1])
    found = [top for top in ranks if ranks[top] == {2, 3} and len(sizes[top]) == 1 and sizes[top] != {1}]
    return sorted(top for top in found if not any(outer != top and _under(top, outer) for outer in found))


def _under(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}/")


def layer_names(path: str, shape: tuple[int, ...], layers: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of a weight's layers, as in a report: 'blocks/kernel[3]' if a scan stacks them.

    >>> layer_names("blocks/kernel", (2, 4, 4), (0,))
    ('blocks/kernel[0]', 'blocks/kernel[1]')
    """
    if not layers:
        return (path,)
    indices = itertools.product(*(range(shape[axis]) for axis in layers))
    return tuple(f"{path}[{','.join(map(str, index))}]" for index in indices)


def unknown_layers(given: Mapping[str, Any], layers: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names that are neither leaves nor layers of leaves."""
    return sorted(given.keys() - layers.keys() - {name for names in layers.values() for name in names})


def by_layer(given: Mapping[str, Any], layers: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Expand values given for leaves, 'blocks/kernel', or single layers, 'blocks/kernel[3]', to all layers.

    Args:
        layers: names of the layers of each leaf.

    >>> by_layer({"w": 0.5, "w[1]": 0.2}, {"w": ("w[0]", "w[1]")})
    {'w[0]': 0.5, 'w[1]': 0.2}
    """
    of_leaf = {name: given[path] for path, names in layers.items() if path in given for name in names}
    return of_leaf | {name: value for name, value in given.items() if name not in layers}
