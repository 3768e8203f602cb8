"""Floating-point operations of a forward pass, from the configuration alone."""

from collections.abc import Callable

from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig


def forward_flops(config: ModelConfig, context: float, *, head: bool = True) -> float:
    """FLOPs a token of one forward pass, a multiply-add counted as two.

    Counted is what the mathematics needs, not what an implementation spends: matrix products of the
    experts a token visits, the decayed sum of lightning attention as a recurrence, and softmax
    over `context` keys a query (half the length for causal attention over a whole sequence). The
    embedding look-up is free; the head counts if `head`.
    """
    D = config.hidden_dim
    total = 2.0 * D * config.vocab_size if head else 0.0
    for layer in config.layers:
        total += _MIXER_FLOPS[type(layer.mixer)](layer.mixer, D, context)
        total += _FFN_FLOPS[type(layer.ffn)](layer.ffn, D)
    return total


def training_flops(config: ModelConfig, length: int) -> float:
    """FLOPs a token of an update on rows of `length` tokens: a backward pass takes two forward."""
    return 3.0 * forward_flops(config, length / 2)


def _lightning(mixer: layers.LightningAttention, D: int, context: float) -> float:
    H, K = mixer.num_heads, mixer.head_dim
    # qkv, gate and out projections; then k v into the state and q out of it.
    return 2.0 * D * 5 * H * K + 4.0 * H * K * K


def _softmax(mixer: layers.SoftmaxAttention, D: int, context: float) -> float:
    H, G, K = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    return 2.0 * D * (2 * H + 2 * G) * K + 4.0 * H * K * context


def _dense(ffn: layers.DenseFfn, D: int) -> float:
    return 6.0 * D * ffn.hidden_dim


def _moe(ffn: layers.MoeFfn, D: int) -> float:
    shared = 0 if ffn.shared is None else ffn.shared.hidden_dim
    active = ffn.router.experts_per_token * ffn.hidden_dim + shared
    return 2.0 * D * ffn.num_experts + 6.0 * D * active


_MIXER_FLOPS: dict[type, Callable[..., float]] = {
    layers.LightningAttention: _lightning,
    layers.SoftmaxAttention: _softmax,
}
_FFN_FLOPS: dict[type, Callable[..., float]] = {layers.DenseFfn: _dense, layers.MoeFfn: _moe}
