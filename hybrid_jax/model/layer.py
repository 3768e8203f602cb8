"""One layer: norm, mixer, residual, norm, feed-forward, residual."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.config import layers
from hybrid_jax.model import remat
from hybrid_jax.model.context import Context
from hybrid_jax.model.ffn.table import FFNS
from hybrid_jax.model.mixers.table import MIXERS
from hybrid_jax.model.norm import RmsNorm
from hybrid_jax.model.params import Initialiser


class LayerModule(nnx.Module):
    """Owns the two halves of a layer and their norms."""

    def __init__(self, init: Initialiser, spec: layers.Layer, dim: int, norm_eps: float):
        self.spec = spec
        self.mixer_norm = RmsNorm(init, dim, norm_eps)
        self.mixer = MIXERS[type(spec.mixer)](init, spec.mixer, dim, norm_eps)
        self.ffn_norm = RmsNorm(init, dim, norm_eps)
        self.ffn = FFNS[type(spec.ffn)](init, spec.ffn, dim)

    def __call__(self, x_BTD, context: Context, layer_data, state):
        """(x after the layer, the mixer's state, the router's statistics or None)."""
        residual = self.spec.residual
        h_BTD = self.mixer_norm(x_BTD)
        mixed_BTD, state = self.mixer(h_BTD, context, layer_data, state)
        mixed_BTD = checkpoint_name(mixed_BTD, remat.MIXED)
        kept_BTD = h_BTD if residual.source == "normed" else x_BTD
        x_BTD = residual.mixer_alpha * kept_BTD + residual.mixer_beta * mixed_BTD
        h_BTD = self.ffn_norm(x_BTD)
        fed_BTD, routing = self.ffn(h_BTD, context)
        kept_BTD = h_BTD if residual.source == "normed" else x_BTD
        x_BTD = residual.ffn_alpha * kept_BTD + residual.ffn_beta * fed_BTD
        return x_BTD, state, routing
