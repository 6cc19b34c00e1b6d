"""What a model costs: operations counted, memory, measured time."""

from jaxeff.cost.chips import Chip as Chip
from jaxeff.cost.compiling import Compiled as Compiled
from jaxeff.cost.compiling import compiled as compiled
from jaxeff.cost.counting import count as count
from jaxeff.cost.counting import count_function as count_function
from jaxeff.cost.footprint import Kept as Kept
from jaxeff.cost.footprint import Memory as Memory
from jaxeff.cost.footprint import Pass as Pass
from jaxeff.cost.footprint import Size as Size
from jaxeff.cost.footprint import memory as memory
from jaxeff.cost.records import Cost as Cost
from jaxeff.cost.records import Entry as Entry
from jaxeff.cost.records import Statement as Statement
from jaxeff.cost.roofline import Floor as Floor
from jaxeff.cost.roofline import FloorEntry as FloorEntry
from jaxeff.cost.roofline import floor as floor
from jaxeff.cost.storage import Storage as Storage
from jaxeff.cost.storage import storage as storage
from jaxeff.cost.timing import Latency as Latency
from jaxeff.cost.timing import Peak as Peak
from jaxeff.cost.timing import latencies as latencies
from jaxeff.cost.timing import latency as latency
from jaxeff.cost.timing import peak as peak
from jaxeff.cost.work import Work as Work
