"""How well weights and inputs would quantize: outliers, ranges, and errors of rounding to int8 and fp8."""

from jaxeff.quantization._outliers import Outliers as Outliers
from jaxeff.quantization._outliers import outliers as outliers
from jaxeff.quantization._records import InputRanges as InputRanges
from jaxeff.quantization._records import LayerOutliers as LayerOutliers
from jaxeff.quantization._records import WeightErrors as WeightErrors
