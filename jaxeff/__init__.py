"""Which weights of a JAX network earn their keep, what they cost, and what can be removed.

>>> import flax.linen as nn, jax, jax.numpy as jnp, jaxeff
>>> model = nn.Dense(4)
>>> batch = jnp.ones((8, 3))
>>> variables = model.init(jax.random.key(0), batch)
>>> report = jaxeff.analyze(variables, model.apply, batch)
>>> list(report.layers)
['kernel']
"""

from importlib.metadata import version as _version

from jaxeff import cost as cost
from jaxeff import importance as importance
from jaxeff import metrics as metrics
from jaxeff import plot as plot
from jaxeff import prune as prune
from jaxeff.analysis import analyze as analyze
from jaxeff.calibration import calibrate as calibrate
from jaxeff.collection import collect as collect
from jaxeff.comparison import Comparison as Comparison
from jaxeff.comparison import compare_criteria as compare_criteria
from jaxeff.metrics import sketch as sketch
from jaxeff.models import from_nnx as from_nnx
from jaxeff.monitoring import monitor as monitor
from jaxeff.pathways import Pathways as Pathways
from jaxeff.pathways import pathways as pathways
from jaxeff.recommendations import Recommendation as Recommendation
from jaxeff.report import Report as Report
from jaxeff.statistics import Statistics as Statistics
from jaxeff.statistics import merge as merge

__version__ = _version("jaxeff")
