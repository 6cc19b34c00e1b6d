"""Masks made of importance, and an optimizer that keeps to them.

importance = prune.scored(params)                      # or of a criterion, from statistics
masks = prune.masks(importance, sparsity=0.9)          # True = kept
params = prune.apply(params, masks)
optimizer = prune.sparsify(optax.adamw(1e-3), prune.cubic(0.9, begin=100, end=1000, every=50))
"""

from jaxeff.prune.allocation import ALLOCATIONS as ALLOCATIONS
from jaxeff.prune.dynamic import rigl as rigl
from jaxeff.prune.dynamic import sparse_evolution as sparse_evolution
from jaxeff.prune.masks import apply as apply
from jaxeff.prune.masks import masks as masks
from jaxeff.prune.masks import pack as pack
from jaxeff.prune.masks import scored as scored
from jaxeff.prune.masks import sparsity as sparsity
from jaxeff.prune.masks import straight_through as straight_through
from jaxeff.prune.masks import unpack as unpack
from jaxeff.prune.optimizer import SparseState as SparseState
from jaxeff.prune.optimizer import sparsify as sparsify
from jaxeff.prune.patterns import Block as Block
from jaxeff.prune.patterns import NByM as NByM
from jaxeff.prune.patterns import Units as Units
from jaxeff.prune.patterns import Unstructured as Unstructured
from jaxeff.prune.schedules import cubic as cubic
from jaxeff.prune.schedules import one_shot as one_shot
from jaxeff.prune.schedules import periodic as periodic
