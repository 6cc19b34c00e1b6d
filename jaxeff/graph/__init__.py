"""The jaxpr walk: a traced function -> the sites of its weights."""

from jaxeff.graph.attention import Attention as Attention
from jaxeff.graph.attention import Headless as Headless
from jaxeff.graph.attention import attentions as attentions
from jaxeff.graph.axes import positions as positions
from jaxeff.graph.contractions import Multiplications as Multiplications
from jaxeff.graph.contractions import multiplications as multiplications
from jaxeff.graph.evaluation import Hooks as Hooks
from jaxeff.graph.evaluation import evaluate as evaluate
from jaxeff.graph.lrp_rules import Propagation as Propagation
from jaxeff.graph.lrp_rules import relevance_rules as relevance_rules
from jaxeff.graph.program import Program as Program
from jaxeff.graph.program import flatten as flatten
from jaxeff.graph.provenance import Loop as Loop
from jaxeff.graph.sites import Graph as Graph
from jaxeff.graph.sites import Leaf as Leaf
from jaxeff.graph.sites import Site as Site
from jaxeff.graph.sites import build as build
