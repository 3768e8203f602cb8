"""What the three dialects share: sizes into layers, and layers back into one set of sizes."""

import dataclasses

from hybrid_jax.checkpoint.hf_config.fields import Fields
from hybrid_jax.config import layers, model

# What the released config classes use where a file does not say; none of them changes the network.
_DEFAULT_POSITIONS = 131072
_DEFAULT_INITIALIZER_RANGE = 0.02
# Of all layers: M2 has 15,872. It keeps a damaged file from filling the memory with names.
_MOST_EXPERTS = 100_000
_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes of the attention of all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def lightning(self) -> layers.LightningAttention:
        """A lightning layer of these sizes, with the released epsilon."""
        return layers.LightningAttention(num_heads=self.num_heads, head_dim=self.head_dim)

    def softmax(self, theta: float, rotary_dim: int, qk_norm: bool) -> layers.SoftmaxAttention:
        """A softmax layer of these sizes."""
        return layers.SoftmaxAttention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            qk_norm=qk_norm,
        )


def read_attention(fields: Fields) -> Attention:
    """Head counts and size; without `head_dim`, heads share the model's width (released code)."""
    heads, wide = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", None)
    if head_dim is None:
        if wide % heads:
            fields.fail(
                "num_attention_heads", f"a divisor of hidden_size={wide}, or head_dim given", heads
            )
        head_dim = wide // heads
    return Attention(heads, fields.size("num_key_value_heads"), head_dim)


def read_num_layers(fields: Fields) -> int:
    """Layers."""
    return fields.size("num_hidden_layers", most=model.MAX_LAYERS)


def read_moe(fields: Fields, router) -> layers.MoeFfn:
    """The experts; `router` is the class of the router."""
    return layers.MoeFfn(
        num_experts=fields.size("num_local_experts", most=10_000),
        hidden_dim=fields.size("intermediate_size"),
        router=router(experts_per_token=fields.size("num_experts_per_tok")),
    )


def read_model(fields: Fields, all_layers) -> model.ModelConfig:
    """The rest of a config.json around its layers, after which no unknown field may be left."""
    # Only SiLU, full attention and plain weights are computed here.
    fields.only("hidden_act", "silu")
    fields.only("sliding_window", None)
    # Not read here, but transformers looks the name up in PyTorch.
    for name in ("dtype", "torch_dtype"):
        fields.only(name, None, *_DTYPES)
    for name in ("model_type", "quantization_config"):
        fields.get(name)
    # One name each.
    experts = sum(layer.ffn.num_experts for layer in all_layers)
    if experts > _MOST_EXPERTS:
        fields.fail("num_local_experts", f"at most {_MOST_EXPERTS} in all layers together", experts)
    pattern, repeats = model.fold_layers(all_layers)
    config = model.ModelConfig(
        name=str(fields.values["model_type"]),
        vocab_size=fields.size("vocab_size"),
        hidden_dim=fields.size("hidden_size"),
        pattern=pattern,
        repeats=repeats,
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", _DEFAULT_INITIALIZER_RANGE),
        max_positions=fields.size("max_position_embeddings", _DEFAULT_POSITIONS),
    )
    fields.finish()
    return config


@dataclasses.dataclass(frozen=True)
class Parts:
    """The one value that every layer of a published model shares, or None where no layer has it."""

    lightning: layers.LightningAttention | None
    softmax: layers.SoftmaxAttention | None
    ffn: layers.MoeFfn
    lightning_residual: layers.Residual | None
    softmax_residual: layers.Residual | None

    @property
    def attention(self) -> layers.SoftmaxAttention | layers.LightningAttention:
        """A mixer with the head count and size that all layers share."""
        mixer = self.softmax or self.lightning
        assert mixer is not None, "a model has at least one layer"
        return mixer

    @property
    def residual(self) -> layers.Residual:
        """A residual with the source and the feed-forward factors that all layers share."""
        residual = self.softmax_residual or self.lightning_residual
        assert residual is not None, "a model has at least one layer"
        return residual


def parts(config: model.ModelConfig) -> Parts:
    """ValueError if layers differ in a way for which config.json has no field."""

    def one(what: str, values):
        values = set(values)
        if len(values) > 1:
            raise ValueError(
                f"config.json has one {what} for all layers; this model has {len(values)}. Save as "
                "orbax instead."
            )
        return values.pop() if values else None

    lightning, softmax = (
        [layer for layer in config.layers if isinstance(layer.mixer, kind)]
        for kind in (layers.LightningAttention, layers.SoftmaxAttention)
    )
    found = Parts(
        lightning=one("lightning attention", (layer.mixer for layer in lightning)),
        softmax=one("softmax attention", (layer.mixer for layer in softmax)),
        ffn=one("feed-forward", (layer.ffn for layer in config.layers)),
        lightning_residual=one("residual for lightning layers", (la.residual for la in lightning)),
        softmax_residual=one("residual for softmax layers", (la.residual for la in softmax)),
    )
    one("residual source", (layer.residual.source for layer in config.layers))
    one(
        "pair of factors around the feed-forward",
        ((layer.residual.ffn_alpha, layer.residual.ffn_beta) for layer in config.layers),
    )
    _check_published(config, found)
    return found


def _check_published(config: model.ModelConfig, found: Parts) -> None:
    lightning, softmax = found.lightning, found.softmax
    for is_wrong, what in (
        (not isinstance(found.ffn, layers.MoeFfn), "a dense feed-forward"),
        (config.shift_embeddings, "shifted embeddings"),
        (
            lightning is not None and lightning.norm_eps != 1e-6,
            "an inner lightning epsilon but 1e-6",
        ),
        (
            lightning is not None
            and softmax is not None
            and (lightning.num_heads, lightning.head_dim) != (softmax.num_heads, softmax.head_dim),
            "heads that differ between lightning and softmax layers",
        ),
    ):
        if is_wrong:
            raise ValueError(f"config.json has no field for {what}. Save as orbax instead.")


def write_shared(config: model.ModelConfig, found: Parts) -> dict:
    """The fields that all dialects spell the same."""
    attention = found.attention
    return {
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_dim,
        "initializer_range": config.initializer_range,
        "intermediate_size": found.ffn.hidden_dim,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": attention.num_heads,
        "num_experts_per_tok": found.ffn.router.experts_per_token,
        "num_hidden_layers": config.num_layers,
        # No softmax layer, no key-value heads: any divisor will do.
        "num_key_value_heads": found.softmax.num_kv_heads if found.softmax else attention.num_heads,
        "num_local_experts": found.ffn.num_experts,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def factors(found: Parts) -> dict[str, float]:
    """The six residual factors; 1 where no layer has the kind."""
    full = found.softmax_residual or layers.Residual(source="input")
    linear = found.lightning_residual or layers.Residual(source="input")
    ffn = found.residual
    return {
        "full_alpha": full.mixer_alpha,
        "full_beta": full.mixer_beta,
        "linear_alpha": linear.mixer_alpha,
        "linear_beta": linear.mixer_beta,
        "ffn_alpha": ffn.ffn_alpha,
        "ffn_beta": ffn.ffn_beta,
    }


def rope_of(found: Parts) -> tuple[float, int]:
    """(theta, rotated dims) of the softmax layers; the released base if there is none."""
    if found.softmax is None:
        return 1e7, found.attention.head_dim
    return found.softmax.rope_theta, found.softmax.rotary_dim
