"""The report that `jaxeff.analyze` returns, with the numbers of every layer and of the model, and its views."""

from jaxeff.report._recommendations import Recommendation as Recommendation
from jaxeff.report._records import Activity as Activity
from jaxeff.report._records import AttentionReport as AttentionReport
from jaxeff.report._records import LayerNumbers as LayerNumbers
from jaxeff.report._records import LayerReport as LayerReport
from jaxeff.report._records import LayerStructure as LayerStructure
from jaxeff.report._records import ModelReport as ModelReport
from jaxeff.report._records import ModuleReport as ModuleReport
from jaxeff.report._records import OtherNumbers as OtherNumbers
from jaxeff.report._records import OtherReport as OtherReport
from jaxeff.report._records import OtherStructure as OtherStructure
from jaxeff.report._records import none_of as none_of
from jaxeff.report._report import Report as Report
