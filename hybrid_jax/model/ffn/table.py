"""Every kind of feed-forward and the module that computes it; the table is total over the union."""

from typing import Any

from hybrid_jax.config import layers
from hybrid_jax.model.ffn.dense import DenseSwiGlu
from hybrid_jax.model.ffn.moe import MixtureOfExperts

FFNS: dict[type, Any] = {
    layers.DenseFfn: DenseSwiGlu,
    layers.MoeFfn: MixtureOfExperts,
}
