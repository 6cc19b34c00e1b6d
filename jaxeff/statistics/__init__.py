"""Statistics of one run of a model: sums over activations, and over derivatives of the loss."""

from jaxeff.statistics.ranges import Ranges as Ranges
from jaxeff.statistics.records import AttentionStatistics as AttentionStatistics
from jaxeff.statistics.records import Conservation as Conservation
from jaxeff.statistics.records import Derivatives as Derivatives
from jaxeff.statistics.records import HeadlessAttention as HeadlessAttention
from jaxeff.statistics.records import HeadSlices as HeadSlices
from jaxeff.statistics.records import ModuleStatistics as ModuleStatistics
from jaxeff.statistics.records import Moments as Moments
from jaxeff.statistics.records import SecondMoments as SecondMoments
from jaxeff.statistics.records import SiteStatistics as SiteStatistics
from jaxeff.statistics.records import Stability as Stability
from jaxeff.statistics.records import Statistics as Statistics
from jaxeff.statistics.records import UnitStatistics as UnitStatistics
from jaxeff.statistics.records import check_alike as check_alike
from jaxeff.statistics.records import check_params as check_params
from jaxeff.statistics.records import merge as merge
