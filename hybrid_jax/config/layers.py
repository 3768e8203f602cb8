"""What a layer can be made of: mixers, feed-forwards, routers, residuals, each a frozen value."""

import dataclasses


def require_positive(config, *names: str) -> None:
    """ValueError unless every named field of `config` is a whole number above zero."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(
                f"{type(config).__name__}.{name} must be a positive whole number; got {value!r}."
            )


def require_at_least_zero(config, *names: str) -> None:
    """ValueError unless every named field of `config` is a number >= 0."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{type(config).__name__}.{name} must be >= 0; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningAttention:
    """Linear attention with a fixed decay per head (MiniMax-01 report, section 2.2)."""

    num_heads: int
    """Heads; query, key and value have the same number."""
    head_dim: int
    """Size of a key and of a value."""
    norm_eps: float = 1e-6
    """Epsilon of the norm over all heads before the gate. The released code leaves it at 1e-6."""

    def __post_init__(self):
        require_positive(self, "num_heads", "head_dim")
        require_at_least_zero(self, "norm_eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttention:
    """Causal grouped-query attention; rotary positions on the first `rotary_dim` dims of a head."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides `num_heads`."""
    head_dim: int
    """Size of a query, key and value."""
    rotary_dim: int
    """Leading dims of a head that are rotated, in half-split pairs (i, i + rotary_dim / 2)."""
    rope_theta: float
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """RMS norm over the whole query and key projections before the heads are split (M2)."""

    def __post_init__(self):
        require_positive(self, "num_heads", "num_kv_heads", "head_dim")
        require_at_least_zero(self, "rotary_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}."
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive; got {self.rope_theta!r}.")


Mixer = LightningAttention | SoftmaxAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxTopK:
    """Softmax over all experts; the best `experts_per_token` are renormalised (Text-01, M1)."""

    experts_per_token: int
    """Experts that each token visits."""

    def __post_init__(self):
        require_positive(self, "experts_per_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidTopK:
    """Sigmoid scores; a learned bias takes part in the selection only, not in the weights (M2)."""

    experts_per_token: int
    """Experts that each token visits."""

    def __post_init__(self):
        require_positive(self, "experts_per_token")


Router = SoftmaxTopK | SigmoidTopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """A dense SwiGLU beside the routed experts, mixed in by a sigmoid coefficient per token."""

    hidden_dim: int
    """Width between its two matrices."""

    def __post_init__(self):
        require_positive(self, "hidden_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFfn:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    hidden_dim: int
    """Width between its two matrices."""

    def __post_init__(self):
        require_positive(self, "hidden_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeFfn:
    """A mixture of SwiGLU experts; every token visits its chosen experts, none is dropped."""

    num_experts: int
    """Routed experts."""
    hidden_dim: int
    """Width between the two matrices of one expert."""
    router: Router
    """How experts are chosen and weighed."""
    shared: SharedExpert | None = None
    """An expert that every token visits, if any."""

    def __post_init__(self):
        require_positive(self, "num_experts", "hidden_dim")
        if self.router.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.router.experts_per_token} cannot exceed "
                f"num_experts={self.num_experts}."
            )


Ffn = DenseFfn | MoeFfn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """x = alpha * r + beta * f(norm(x)), with r the normalised or the raw input of the sublayer.

    `normed` with alpha = (2 * layers) ** 0.25 is the released DeepNorm-style post-norm; `input`
    with all factors 1 is plain pre-norm (M2).
    """

    source: str
    """`normed`: the residual is norm(x); `input`: it is x itself."""
    mixer_alpha: float = 1.0
    """Factor of the residual around the mixer."""
    mixer_beta: float = 1.0
    """Factor of the mixer's output."""
    ffn_alpha: float = 1.0
    """Factor of the residual around the feed-forward."""
    ffn_beta: float = 1.0
    """Factor of the feed-forward's output."""

    def __post_init__(self):
        if self.source not in ("normed", "input"):
            raise ValueError(f"Residual.source must be 'normed' or 'input'; got {self.source!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: norm, mixer, residual, norm, feed-forward, residual."""

    mixer: Mixer
    """The token-mixing half."""
    ffn: Ffn
    """The feed-forward half."""
    residual: Residual
    """Where the residual is taken and how both sides are scaled."""
