"""Cost of a model: operations, memory and measured time."""

from jaxeff.cost._chips import Chip as Chip
from jaxeff.cost._compiling import Compiled as Compiled
from jaxeff.cost._compiling import compiled as compiled
from jaxeff.cost._counting import count as count
from jaxeff.cost._counting import count_function as count_function
from jaxeff.cost._footprint import GradientMemory as GradientMemory
from jaxeff.cost._footprint import Memory as Memory
from jaxeff.cost._footprint import SavedResidual as SavedResidual
from jaxeff.cost._footprint import Size as Size
from jaxeff.cost._footprint import memory as memory
from jaxeff.cost._records import Cost as Cost
from jaxeff.cost._records import Entry as Entry
from jaxeff.cost._records import Statement as Statement
from jaxeff.cost._roofline import Floor as Floor
from jaxeff.cost._roofline import FloorEntry as FloorEntry
from jaxeff.cost._roofline import floor as floor
from jaxeff.cost._storage import Storage as Storage
from jaxeff.cost._storage import storage as storage
from jaxeff.cost._timing import Latency as Latency
from jaxeff.cost._timing import Peak as Peak
from jaxeff.cost._timing import latencies as latencies
from jaxeff.cost._timing import latency as latency
from jaxeff.cost._timing import peak as peak
from jaxeff.cost._work import Work as Work
