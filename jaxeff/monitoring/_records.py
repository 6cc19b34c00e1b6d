"""The numbers of one check: a few short arrays, however large the model."""

from __future__ import annotations

import dataclasses
import itertools

import jax


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """A floating leaf of `params`, and the stacked blocks whose norms are taken apart.

    Attributes:
        path: keys joined by '/'.
        shape: of the leaf.
        axes: those over which it stacks blocks that a scan runs through; empty if it is of one block.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The name of each block: '[0]', '[1]', ...; one empty name if the leaf stacks none."""
        indices = itertools.product(*(range(self.shape[axis]) for axis in self.axes))
        return tuple(f"[{','.join(map(str, index))}]" if index else "" for index in indices)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norms:
    """Norms of one tree of arrays, an entry for each block of each leaf.

    Attributes:
        norm: [parts], the square root of the sum of squares, in float32 at least.
        nonfinite: int32 [parts], elements that are nan or infinite; -1 if the tree was not passed.
    """

    norm: jax.Array
    nonfinite: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """What the units of each weight emitted, [weights], in the report's order; nan if no activations were read.

    Attributes:
        dead: units that emitted only 0.
        dormant: tau-dormant units.
        zero_fraction: fraction of the values that are exactly 0.
        crest_factor: max |a| over the root mean square of a.
    """

    dead: jax.Array
    dormant: jax.Array
    zero_fraction: jax.Array
    crest_factor: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """Numbers of each attention, [attentions], in the report's order; stacked blocks have an entry each.

    Attributes:
        largest_logit: before the softmax, after any mask.
        entropy: mean over heads and queries, in nats.
        lowest_entropy: of the head that has the lowest, a mean over queries.
    """

    largest_logit: jax.Array
    entropy: jax.Array
    lowest_entropy: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralRanks:
    """Ranks of the matrices of every weight, as in `jaxeff.spectra`; nan if one is not finite or all 0.

    Attributes:
        paths: of the matrices, with an index where a scan or a batched product stacks several.
        effective_rank: [matrices], exp(-sum p ln p) with p = s / sum s, of the singular values s.
        stable_rank: [matrices], sum s^2 / max s^2.
    """

    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    effective_rank: jax.Array
    stable_rank: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vitals:
    """The numbers of one check. Those that cost more are of the latest report.

    Attributes:
        params, gradients, updates: norms of each.
        activations: of the units of each weight.
        attention: of each attention.
        effective_params: [weights], effective weights, of the latest report.
    """

    params: Norms
    gradients: Norms
    updates: Norms
    activations: Activations
    attention: Attention
    effective_params: jax.Array
