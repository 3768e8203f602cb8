"""Every kind of mixer and the module that computes it; the table is total over the union."""

from hybrid_jax.config import layers
from hybrid_jax.model.mixers.lightning import LightningMixer
from hybrid_jax.model.mixers.softmax import SoftmaxMixer

MIXERS = {
    layers.LightningAttention: LightningMixer,
    layers.SoftmaxAttention: SoftmaxMixer,
}
