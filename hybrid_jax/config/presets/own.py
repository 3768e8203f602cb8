"""Shapes of our own: studies near the report's sizes, the quickstart model and the test model.

The MiniMax-01 report names its scaling-study sizes (70M to 7B, section 2.2) but gives no widths;
the widths here are ours and published by nobody else.
"""

import dataclasses

from hybrid_jax.config import layers, model


def hybrid(
    name: str,
    *,
    vocab_size: int,
    hidden_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    ffn: layers.Ffn,
    rope_theta: float = 10000.0,
    max_positions: int = 8192,
    tie_embeddings: bool = False,
    period: int = 8,
) -> model.ModelConfig:
    """A hybrid stack: every `period`-th layer softmax, the others lightning, DeepNorm residuals.

    Raises ValueError if `num_layers` is not a multiple of `period`.
    """
    if num_layers % period:
        raise ValueError(f"num_layers={num_layers} must be a multiple of period={period}.")
    alpha = float((2 * num_layers) ** 0.25)
    residual = layers.Residual(source="normed", mixer_alpha=alpha, ffn_alpha=alpha)
    lightning = layers.LightningAttention(num_heads=num_heads, head_dim=head_dim)
    softmax = layers.SoftmaxAttention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
    )
    return model.ModelConfig(
        name=name,
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        pattern=(
            model.Run(
                layer=layers.Layer(mixer=lightning, ffn=ffn, residual=residual), count=period - 1
            ),
            model.Run(layer=layers.Layer(mixer=softmax, ffn=ffn, residual=residual), count=1),
        ),
        repeats=num_layers // period,
        norm_eps=1e-5,
        tie_embeddings=tie_embeddings,
        max_positions=max_positions,
    )


def _study(name, hidden_dim, num_layers, num_heads, head_dim, tie_embeddings=False):
    return hybrid(
        name,
        vocab_size=32768,
        hidden_dim=hidden_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
        # 8/3 of the width: a SwiGLU then holds as much as a classic feed-forward of 4 x the width.
        ffn=layers.DenseFfn(hidden_dim=hidden_dim * 8 // 3 // 64 * 64),
        tie_embeddings=tie_embeddings,
    )


def study_70m() -> model.ModelConfig:
    """Our own shape near the report's 70M: 512 wide, 16 layers, dense, tied."""
    return _study("study-70m", 512, 16, num_heads=8, head_dim=64, tie_embeddings=True)


def study_410m() -> model.ModelConfig:
    """Our own shape near the report's 410M: 1024 wide, 24 layers, dense feed-forward."""
    return _study("study-410m", hidden_dim=1024, num_layers=24, num_heads=16, head_dim=64)


def study_1b() -> model.ModelConfig:
    """Our own shape near the report's 1B: 1536 wide, 32 layers, dense feed-forward."""
    return _study("study-1b", hidden_dim=1536, num_layers=32, num_heads=16, head_dim=96)


def quickstart() -> model.ModelConfig:
    """About 32M parameters for two CPU cores: 8 layers 7:1, 8 experts top-2.

    Rotary covers the whole head so that transformers, which ignores rotary_dim, loads its export.
    """
    config = hybrid(
        "quickstart",
        vocab_size=8192,
        hidden_dim=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=64,
        ffn=layers.MoeFfn(
            num_experts=8, hidden_dim=512, router=layers.SoftmaxTopK(experts_per_token=2)
        ),
    )
    # A training step takes 7% less time than as a loop on 2 CPU cores, and compiling 6 s more.
    return dataclasses.replace(config, scan_layers=False)


def nano() -> model.ModelConfig:
    """About 1M parameters, for tests: every part of the family at its smallest."""
    return hybrid(
        "nano",
        vocab_size=512,
        hidden_dim=64,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=16,
        ffn=layers.MoeFfn(
            num_experts=4, hidden_dim=96, router=layers.SoftmaxTopK(experts_per_token=2)
        ),
        max_positions=4096,
    )
