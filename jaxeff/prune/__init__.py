"""Pruning: masks from importance, an optimizer that maintains them, recipes, and smaller networks.

importance = prune.scored(params)                      # or by a criterion, from statistics
masks = prune.masks(importance, sparsity=0.9)          # True = kept
params = prune.apply(params, masks)
optimizer = prune.sparsify(optax.adamw(1e-3), prune.cubic(0.9, begin=100, end=1000, every=50))
optimizer = prune.sparsify(optax.adamw(1e-3), masks=masks)  # or under existing masks
pruned = prune.iterative_magnitude(state, step, batches, evaluate, sparsity=0.95, rounds=8, steps=500)

groups = prune.groups(params, model.apply, batch)      # which axes of which leaves shrink together
plan = prune.plan(groups, importance, sparsity=0.5)    # JSON
small = prune.shrink(params, plan)                     # for a module of `plan.widths()`
prune.before_and_after((params, model.apply), (small, smaller.apply), [x[:1], x[:32]])  # measured
"""

from jaxeff.prune._allocation import ALLOCATIONS as ALLOCATIONS
from jaxeff.prune._allocation import owl as owl
from jaxeff.prune._batch_norm import recalibrate as recalibrate
from jaxeff.prune._before_and_after import BeforeAndAfter as BeforeAndAfter
from jaxeff.prune._before_and_after import before_and_after as before_and_after
from jaxeff.prune._block_by_block import block_by_block as block_by_block
from jaxeff.prune._blocks import BlockOrder as BlockOrder
from jaxeff.prune._blocks import block_influence as block_influence
from jaxeff.prune._blocks import order_blocks as order_blocks
from jaxeff.prune._compact import CompactApply as CompactApply
from jaxeff.prune._compact import compact as compact
from jaxeff.prune._criteria import criterion as criterion
from jaxeff.prune._distillation import distillation as distillation
from jaxeff.prune._dynamic import rigl as rigl
from jaxeff.prune._dynamic import sparse_evolution as sparse_evolution
from jaxeff.prune._experts import ExpertImportance as ExpertImportance
from jaxeff.prune._experts import expert_importance as expert_importance
from jaxeff.prune._fluctuation import Fluctuation as Fluctuation
from jaxeff.prune._fluctuation import fluctuation as fluctuation
from jaxeff.prune._grouping import groups as groups
from jaxeff.prune._groups import Group as Group
from jaxeff.prune._groups import Groups as Groups
from jaxeff.prune._groups import Member as Member
from jaxeff.prune._keras import keras_callback as keras_callback
from jaxeff.prune._layouts import Axes as Axes
from jaxeff.prune._layouts import Layout as Layout
from jaxeff.prune._layouts import Scores as Scores
from jaxeff.prune._layouts import layout as layout
from jaxeff.prune._masking import apply as apply
from jaxeff.prune._masking import pack as pack
from jaxeff.prune._masking import sparsity as sparsity
from jaxeff.prune._masking import straight_through as straight_through
from jaxeff.prune._masking import unpack as unpack
from jaxeff.prune._masks import masks as masks
from jaxeff.prune._optimizer import SparseState as SparseState
from jaxeff.prune._optimizer import sparsify as sparsify
from jaxeff.prune._patterns import Block as Block
from jaxeff.prune._patterns import NByM as NByM
from jaxeff.prune._patterns import Units as Units
from jaxeff.prune._patterns import Unstructured as Unstructured
from jaxeff.prune._planning import plan as plan
from jaxeff.prune._plans import Plan as Plan
from jaxeff.prune._recipes import entropy_regularized as entropy_regularized
from jaxeff.prune._recipes import gradual as gradual
from jaxeff.prune._recipes import iterative_magnitude as iterative_magnitude
from jaxeff.prune._recipes import iterative_obd as iterative_obd
from jaxeff.prune._recipes import iterative_taylor as iterative_taylor
from jaxeff.prune._recipes import lottery_ticket as lottery_ticket
from jaxeff.prune._reconstruction import reconstruct as reconstruct
from jaxeff.prune._recycling import Recycled as Recycled
from jaxeff.prune._recycling import recycle as recycle
from jaxeff.prune._regularization import EntropyState as EntropyState
from jaxeff.prune._regularization import add_entropy_gradient as add_entropy_gradient
from jaxeff.prune._rounds import Pruned as Pruned
from jaxeff.prune._rounds import Round as Round
from jaxeff.prune._rounds import iterative as iterative
from jaxeff.prune._schedules import cubic as cubic
from jaxeff.prune._schedules import one_shot as one_shot
from jaxeff.prune._schedules import periodic as periodic
from jaxeff.prune._scoring import scored as scored
from jaxeff.prune._sensitivity import Sensitivity as Sensitivity
from jaxeff.prune._sensitivity import sensitivity as sensitivity
from jaxeff.prune._shrinking import shrink as shrink
from jaxeff.prune._sparsegpt import sparsegpt as sparsegpt
