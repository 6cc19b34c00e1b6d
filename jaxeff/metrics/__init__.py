"""Metrics of how evenly importance is spread over the weights of one layer.

    summarize(x)             every metric at once
    gini(x), entropy(x) ...  one of them
    sketch                   counts that add, for weights in parts

Every function takes a non-negative array of importances x, of any shape and real dtype, and runs under `jit`,
`vmap`, `grad` and `scan`.
"""

from jaxeff.metrics import sketch as sketch
from jaxeff.metrics._curve import Distribution as Distribution
from jaxeff.metrics._functions import coverage as coverage
from jaxeff.metrics._functions import effective_params as effective_params
from jaxeff.metrics._functions import entropy as entropy
from jaxeff.metrics._functions import gini as gini
from jaxeff.metrics._functions import normalized_entropy as normalized_entropy
from jaxeff.metrics._functions import redundancy as redundancy
from jaxeff.metrics._functions import relative_sparsity as relative_sparsity
from jaxeff.metrics._functions import sparsity as sparsity
from jaxeff.metrics._functions import summarize as summarize
from jaxeff.metrics._functions import utilization as utilization
from jaxeff.metrics._records import Bounds as Bounds
from jaxeff.metrics._records import Metrics as Metrics
