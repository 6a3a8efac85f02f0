"""jaxvq: codebook quantization of neural-network weights for JAX."""

from jaxvq.array import Affine as Affine
from jaxvq.array import Codebook as Codebook
from jaxvq.array import QuantizedArray as QuantizedArray
from jaxvq.array import combine as combine
from jaxvq.array import partition as partition
from jaxvq.layout import Layout as Layout
from jaxvq.methods import KMeans as KMeans
from jaxvq.methods import Product as Product
from jaxvq.methods import Residual as Residual
from jaxvq.methods import RowVQ as RowVQ
from jaxvq.methods import Symmetric as Symmetric
from jaxvq.methods import Uniform as Uniform
from jaxvq.metrics import Report as Report
from jaxvq.metrics import report as report
from jaxvq.ops.nearest import nearest as nearest
from jaxvq.ops.nearest import vq as vq
from jaxvq.quantize import dequantize_params as dequantize_params
from jaxvq.quantize import quantize_params as quantize_params
from jaxvq.spec import Rule as Rule
from jaxvq.spec import Spec as Spec
from jaxvq.spec import resolve as resolve
from jaxvq.stats import LayerStats as LayerStats
from jaxvq.storage import load as load
from jaxvq.storage import save as save
