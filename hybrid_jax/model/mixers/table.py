"""Every kind of mixer and the module that computes it; the table is total over the union."""

from typing import Any

from hybrid_jax.config import layers
from hybrid_jax.model.mixers.lightning import LightningMixer
from hybrid_jax.model.mixers.softmax import SoftmaxMixer

MIXERS: dict[type, Any] = {
    layers.LightningAttention: LightningMixer,
    layers.SoftmaxAttention: SoftmaxMixer,
}
