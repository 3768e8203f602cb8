"""Bytes that one decode step has to move, from the configuration alone."""

from collections.abc import Callable

import jax.numpy as jnp

from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model.model import abstract
from hybrid_jax.model.params import count


def decode_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """Bytes read and written by one token of `batch` rows that have `context` tokens behind them.

    Counted are weights, each once (of the experts those that some row is expected to visit, if all
    are visited alike), recurrent memories read and written, and caches read. Not the embedding
    look-up, and no activation.
    """
    weight = jnp.dtype(config.dtypes.parameters).itemsize
    weights = float(count(abstract(config)))
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.hidden_dim
    memory = 0.0
    for layer in config.layers:
        if isinstance(layer.ffn, layers.MoeFfn):
            E, A = layer.ffn.num_experts, layer.ffn.router.experts_per_token
            idle = E * (1 - A / E) ** batch
            weights -= idle * 3 * config.hidden_dim * layer.ffn.hidden_dim
        memory += _STATE_BYTES[type(layer.mixer)](layer.mixer, context, config)
    return weights * weight + batch * memory


def _lightning(mixer: layers.LightningAttention, context: int, config: ModelConfig) -> float:
    return 2 * 4.0 * mixer.num_heads * mixer.head_dim**2


def _softmax(mixer: layers.SoftmaxAttention, context: int, config: ModelConfig) -> float:
    cache = jnp.dtype(config.dtypes.compute).itemsize
    return 2.0 * cache * mixer.num_kv_heads * mixer.head_dim * context


_STATE_BYTES: dict[type, Callable[..., float]] = {
    layers.LightningAttention: _lightning,
    layers.SoftmaxAttention: _softmax,
}
