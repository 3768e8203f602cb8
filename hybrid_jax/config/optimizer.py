"""How gradients become updates."""

import dataclasses

from hybrid_jax.config.checks import check_at_least, check_fraction

MOMENTS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with clipping of the global gradient norm; arithmetic is float32."""

    b1: float = 0.9
    """Decay of the first moment (MiniMax-01 report, section 4.2)."""
    b2: float = 0.95
    """Decay of the second moment (same place)."""
    eps: float = 1e-8
    """Added to the root of the second moment; RL of M1 needed 1e-15."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and vectors are never decayed."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None clips nothing."""
    moments: str = "float32"
    """How both moments are kept: float32, or bfloat16 at 4 bytes a parameter less (as DeepSeek-V3
    was trained, arXiv 2412.19437, section 3.3.3)."""

    def __post_init__(self):
        _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for the matrices of layers; AdamW for embedding, head, routers, norms and vectors.

    The momentum of a matrix is made all but orthogonal by Newton-Schulz iterations; of fused
    projections each part, and each expert, is a matrix of its own. Clipping, decay and schedule are
    those of `AdamW`. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al.,
    arXiv 2502.16982.
    """

    momentum: float = 0.95
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look one gradient ahead."""
    iterations: int = 5
    """Newton-Schulz iterations."""
    rms: float = 0.2
    """Root mean square of a matrix's update at learning rate 1. 0.2 is about AdamW's, so that a
    learning rate means the same for both (arXiv 2502.16982, section 2.2)."""
    b1: float = 0.9
    """Decay of the first moment of everything else."""
    b2: float = 0.95
    """Decay of the second moment of everything else."""
    eps: float = 1e-8
    """Added to the root of that."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, embedding, head and routers; norms and vectors never decay."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None clips nothing."""
    moments: str = "float32"
    """How momentum and moments are kept: float32 or bfloat16."""

    def __post_init__(self):
        _check(self)
        check_fraction(self, "momentum")
        check_at_least(self, 1, "iterations")
        check_at_least(self, 0, "rms", strict=True)


Optimizer = AdamW | Muon


def _check(config) -> None:
    if config.moments not in MOMENTS:
        raise ValueError(
            f"{type(config).__name__}.moments must be one of {MOMENTS}; got {config.moments!r}."
        )
    check_fraction(config, "b1")
    check_fraction(config, "b2")
    check_at_least(config, 0, "eps", "weight_decay")
    if config.clip_norm is not None:
        check_at_least(config, 0, "clip_norm", strict=True)
