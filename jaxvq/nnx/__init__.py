"""Quantized weights in Flax nnx: layers, and the conversion of whole models in place.

A quantized weight is a node of the module graph that stands where its `nnx.Param` stood and reads like it, so every
module runs on it unmodified. Its floating-point parts are `nnx.Param`s, its codes are not: `nnx.grad` and
`nnx.Optimizer(model, tx, wrt=nnx.Param)` train codebooks and scales, and cannot reach the codes.

Example, of fine-tuning with new codes every so many steps:
  >>> import jax, jaxvq
  >>> from flax import nnx
  >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
  >>> before = params_of(model)
  >>> model = quantize_model(model, jaxvq.KMeans(bits=4), key=jax.random.key(0))
  >>> # ... steps of nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param) ...
  >>> model = load_params(model, jaxvq.reassign(params_of(model), before))
  >>> model.layers[0].kernel.array.bits_per_weight
  4.25
"""

from jaxvq.nnx.convert import dequantize_model as dequantize_model
from jaxvq.nnx.convert import harden_model as harden_model
from jaxvq.nnx.convert import load_params as load_params
from jaxvq.nnx.convert import params_of as params_of
from jaxvq.nnx.convert import quantize_model as quantize_model
from jaxvq.nnx.layers import Conv as Conv
from jaxvq.nnx.layers import ConvTranspose as ConvTranspose
from jaxvq.nnx.layers import Embed as Embed
from jaxvq.nnx.layers import Linear as Linear
from jaxvq.nnx.weights import Codes as Codes
from jaxvq.nnx.weights import Latent as Latent
from jaxvq.nnx.weights import Quantized as Quantized
from jaxvq.nnx.weights import TrainingState as TrainingState
