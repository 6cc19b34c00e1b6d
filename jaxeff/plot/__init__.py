"""Plots of reports and measurements, with Matplotlib, which is imported when one is drawn.

Every function takes what to draw and optional axes, and returns the axes; nothing is shown or saved.
"""

from jaxeff.plot._distributions import cumulative as cumulative
from jaxeff.plot._distributions import importances as importances
from jaxeff.plot._distributions import lorenz as lorenz
from jaxeff.plot._layers import depth as depth
from jaxeff.plot._layers import history as history
from jaxeff.plot._layers import layers as layers
from jaxeff.plot._layers import units as units
from jaxeff.plot._measurements import advice as advice
from jaxeff.plot._measurements import criteria as criteria
from jaxeff.plot._measurements import pathways as pathways
from jaxeff.plot._measurements import sensitivity as sensitivity
from jaxeff.plot._measurements import speedups as speedups
