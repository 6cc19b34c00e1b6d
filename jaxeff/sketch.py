"""Metrics of any number of weights from one pass: `count` counts, `merge` adds, `summarize` gives the metrics.

whole = count(x)                          one pass
whole = merge(count(part), count(other))  the same to the bit, however x is split
metrics, bounds = summarize(whole)        each metric, and how far off it may be
"""

from jaxeff.metrics.sketch import Bounds as Bounds
from jaxeff.metrics.sketch import Sketch as Sketch
from jaxeff.metrics.sketch import count as count
from jaxeff.metrics.sketch import merge as merge
from jaxeff.metrics.sketch import summarize as summarize
