"""Pictures of what was measured, with Matplotlib, which is imported when one is drawn.

Every function takes what is drawn and optional axes, and returns the axes; nothing is shown or saved.
"""

from jaxeff.plot.distributions import cumulative as cumulative
from jaxeff.plot.distributions import importances as importances
from jaxeff.plot.distributions import lorenz as lorenz
from jaxeff.plot.layers import history as history
from jaxeff.plot.layers import layers as layers
from jaxeff.plot.layers import radar as radar
from jaxeff.plot.layers import units as units
from jaxeff.plot.measurements import criteria as criteria
from jaxeff.plot.measurements import pathways as pathways
from jaxeff.plot.measurements import sensitivity as sensitivity
from jaxeff.plot.measurements import speedups as speedups
