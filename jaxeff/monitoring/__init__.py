"""What a monitor measures: norms, activations, attention and ranks; their flat names; and events."""

from jaxeff.monitoring._events import Event as Event
from jaxeff.monitoring._events import Limits as Limits
from jaxeff.monitoring._events import events as events
from jaxeff.monitoring._measure import layout as layout
from jaxeff.monitoring._measure import measure as measure
from jaxeff.monitoring._names import scalars as scalars
from jaxeff.monitoring._packing import Packing as Packing
from jaxeff.monitoring._ranks import spectral_ranks as spectral_ranks
from jaxeff.monitoring._records import LeafLayout as LeafLayout
from jaxeff.monitoring._records import SpectralRanks as SpectralRanks
from jaxeff.monitoring._records import Vitals as Vitals
