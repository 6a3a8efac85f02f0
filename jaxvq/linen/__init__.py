"""Flax linen: unmodified models on quantized weights, and layers whose weights are quantized or train to become so.

A quantized weight lies in two collections, at one path, as the two halves of `jaxvq.partition`: what trains of it
(codebooks, scales) in "params", its codes in "codes". So an optimizer of "params" never sees codes. What a layer
remembers from step to step is in the collection "quantization".

Layers that `nn.scan` or `nn.vmap` stack must be stacked along axis 0, and with layers of this module the two must
list "codes" and "quantization" where they list "params".

To go on from a trained float model, pass its "params". What layers with a `training` need beside them is added by
`model.apply({"params": params}, inputs, mutable=True, rngs={"params": key})[1]`.
"""

from jaxvq.linen.layers import Conv as Conv
from jaxvq.linen.layers import ConvTranspose as ConvTranspose
from jaxvq.linen.layers import Dense as Dense
from jaxvq.linen.layers import DenseGeneral as DenseGeneral
from jaxvq.linen.layers import Embed as Embed
from jaxvq.linen.variables import apply as apply
from jaxvq.linen.variables import dequantize as dequantize
from jaxvq.linen.variables import from_variables as from_variables
from jaxvq.linen.variables import harden as harden
from jaxvq.linen.variables import join as join
from jaxvq.linen.variables import to_variables as to_variables
