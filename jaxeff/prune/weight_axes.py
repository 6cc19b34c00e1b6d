"""Which axes of each weight are its inputs and which its units: what patterns go along.

In: statistics, or a model, which is traced and not run. Out: `Axes` by path. Imports of jaxeff `collection`,
`leaves`, `statistics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxeff.collection import collect
from jaxeff.leaves import named_leaves
from jaxeff.statistics import SiteStatistics, Statistics


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one weight by what they index.

    Attributes:
        inputs: what a product sums over, one axis or several; None where the weight's products sum over
            different ones.
        units: the weight's outputs; None where its uses have different ones.
        layers: axes along which weights stand that have nothing in common: the layers of a scan, the members
            of an ensemble.
    """

    inputs: tuple[int, ...] | None
    units: tuple[int, ...] | None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("inputs", "units", "layers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))


# What a kernel of two axes has in Flax.
FLAX_KERNEL = Axes((0,), (1,))


def axes(
    params: Any, apply_fn: Callable, batch: Any, *, rngs: Any = None, **apply_kwargs: Any
) -> dict[str, Axes]:
    """Which axes of each weight are its inputs and which its units, of the operations that consume it.

    The model is traced, and nothing is computed.

    Args:
        params, apply_fn, batch: as `jaxeff.analyze` takes them.
        rngs, apply_kwargs: passed to `apply_fn`.

    Returns:
        Axes by path, of every weight whose uses could be read, for `axes=` of `prune.NByM` and `prune.Units`.

    >>> import jax.numpy as jnp
    >>> model = lambda params, x: jnp.einsum("bi,oi->bo", x, params["w"])
    >>> axes({"w": jnp.ones((3, 4))}, model, jnp.ones((8, 4)))
    {'w': Axes(inputs=(1,), units=(0,), layers=())}
    """
    _ = named_leaves(params, abstract=True)

    def run(params: Any, batch: Any) -> Statistics:
        return collect(params, apply_fn, batch, rngs=rngs, **apply_kwargs)

    return axes_of(jax.eval_shape(run, params, batch))


def axes_of(statistics: Statistics) -> dict[str, Axes]:
    """The axes of every weight that has sites."""
    sites: dict[str, list[SiteStatistics]] = {}
    for site in statistics.sites:
        sites.setdefault(site.path, []).append(site)
    return {path: _of_sites(found) for path, found in sites.items()}


def _of_sites(sites: Iterable[SiteStatistics]) -> Axes:
    sites = tuple(sites)
    # A look-up sums over nothing: of an embedding that is also multiplied (`attend`), products have inputs.
    products = [site for site in sites if site.kind != "embedding"] or sites
    inputs = {tuple(axis for axis in site.input_axes if axis not in site.unit_axes) for site in products}
    units = {tuple(axis for axis in site.unit_axes if axis not in site.input_axes) for site in sites}
    layers = {axis for site in sites for axis in (*site.layer_axes, *_parallel(site))}
    return Axes(_only(inputs), _only(units), tuple(sorted(layers)))


def _parallel(site: SiteStatistics) -> set[int]:
    """Axes that index inputs and units alike: those of a batched product."""
    return set(site.unit_axes) & set(site.input_axes)


def _only(found: set[tuple[int, ...]]) -> tuple[int, ...] | None:
    return next(iter(found)) if len(found) == 1 else None


AxesByPath = Mapping[str, Axes] | Statistics | tuple[tuple[str, Axes], ...]


def by_path(given: AxesByPath) -> tuple[tuple[str, Axes], ...]:
    """What a pattern is given for `axes`, so that equal patterns are equal and can be hashed."""
    if isinstance(given, Statistics):
        given = axes_of(given)
    if isinstance(given, Mapping):
        given = tuple(sorted(given.items(), key=lambda pair: pair[0]))
    if not isinstance(given, tuple) or not all(isinstance(one, Axes) for _, one in given):
        raise TypeError(
            "`axes` must be `prune.Axes` by path, what `prune.axes(params, apply_fn, batch)` gives, or "
            f"statistics of `jaxeff.collect`, got {given!r}"
        )
    return given
