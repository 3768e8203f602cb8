"""Tiny members of the family, each with parts the others lack, and their compiled forward pass."""

import functools

import jax
import numpy as np
from flax import nnx

from hybrid_jax import model as models
from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig, Run

DIM, VOCAB = 24, 48


def _config(name, pattern, repeats, **changes):
    return ModelConfig(
        name=name,
        vocab_size=VOCAB,
        hidden_dim=DIM,
        pattern=pattern,
        repeats=repeats,
        norm_eps=1e-5,
        max_positions=512,
        # Large enough that no part of the network is lost in rounding.
        initializer_range=0.3,
        **changes,
    )


def _moe(router, **changes):
    return layers.MoeFfn(num_experts=4, hidden_dim=20, router=router, **changes)


def text_01(**changes) -> ModelConfig:
    """Two repeats of two lightning layers and one softmax layer, half rotary, post-norm."""
    ffn = _moe(layers.SoftmaxTopK(experts_per_token=2))
    residual = layers.Residual(source="normed", mixer_alpha=1.6, ffn_alpha=1.5, ffn_beta=0.9)
    mixer = layers.SoftmaxAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4, rope_theta=1e4
    )
    lightning = layers.LightningAttention(num_heads=4, head_dim=8)
    pattern = (
        Run(layer=layers.Layer(mixer=lightning, ffn=ffn, residual=residual), count=2),
        Run(layer=layers.Layer(mixer=mixer, ffn=ffn, residual=residual), count=1),
    )
    return _config("text-01-like", pattern, 2, **changes)


def m2(**changes) -> ModelConfig:
    """Two pre-norm softmax layers with norms of queries and keys and a sigmoid router."""
    mixer = layers.SoftmaxAttention(
        num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4, rope_theta=1e4, qk_norm=True
    )
    ffn = _moe(layers.SigmoidTopK(experts_per_token=3))
    layer = layers.Layer(mixer=mixer, ffn=ffn, residual=layers.Residual(source="input"))
    return _config("m2-like", (Run(layer=layer, count=1),), 2, **changes)


def odd(**changes) -> ModelConfig:
    """Three heads, a dense layer beside one with a shared expert, tied head, shifted embeddings."""
    lightning = layers.LightningAttention(num_heads=3, head_dim=8)
    # Not top-1: its renormalised weight is always one, and the router would learn nothing.
    shared = _moe(
        layers.SoftmaxTopK(experts_per_token=2), shared=layers.SharedExpert(hidden_dim=12)
    )
    residual = layers.Residual(source="normed", mixer_alpha=1.4, ffn_alpha=1.4)
    pattern = (
        Run(
            layer=layers.Layer(
                mixer=lightning, ffn=layers.DenseFfn(hidden_dim=16), residual=residual
            ),
            count=1,
        ),
        Run(layer=layers.Layer(mixer=lightning, ffn=shared, residual=residual), count=1),
    )
    changes = {"tie_embeddings": True, "shift_embeddings": True} | changes
    return _config("odd", pattern, 1, **changes)


FAMILY = {"text_01": text_01, "m2": m2, "odd": odd}


@functools.cache
def built(name: str):
    """One random model of the family, norms and biases moved off their trivial start."""
    model = models.build(FAMILY[name]())
    graphdef, params = nnx.split(model, nnx.Param)
    noise = np.random.default_rng(0)

    def move(leaf):
        return leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32)

    return nnx.merge(graphdef, jax.tree.map(move, params))


@functools.cache
def forward(name: str):
    """The compiled `(tokens, segment_ids) -> logits` of `built(name)`; one program a shape."""
    graphdef, params = nnx.split(built(name), nnx.Param)

    @jax.jit
    def run(params, tokens_BT, segment_ids_BT):
        return nnx.merge(graphdef, params)(tokens_BT, segment_ids_BT)

    return lambda tokens_BT, segment_ids_BT=None: np.asarray(run(params, tokens_BT, segment_ids_BT))


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids int32 [rows, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), dtype=np.int32)
