"""config.json as transformers writes it for `minimax` (the "-hf" repositories)."""

from hybrid_jax.checkpoint.hf_config import common
from hybrid_jax.checkpoint.hf_config.fields import Fields, rope
from hybrid_jax.config import layers, model

BLOCK_SIZE = 256
# A table has its square of numbers a head.
MAX_BLOCK_SIZE = 4096


def read(fields: Fields) -> model.ModelConfig:
    """The model that a config.json describes.

    transformers rotates the whole head and has no field for less; `rotary_dim` or
    `partial_rotary_factor` in the file are honoured, as the released weights need them.
    """
    attention = common.read_attention(fields)
    theta, rotary_dim = rope(fields, attention.head_dim, attention.head_dim)
    # No field in transformers, which always normalises the residual; vLLM reads it.
    fields.only("postnorm", True)
    for name in ("block_size", "block"):
        fields.size(name, None, most=MAX_BLOCK_SIZE)
    # Left over where a released config was converted.
    fields.only("shared_intermediate_size", 0, [0])
    fields.get("shared_moe_mode")
    ffn = common.read_moe(fields, layers.SoftmaxTopK)
    kinds = {}
    for code, kind, mixer in (
        ("linear_attention", "linear", attention.lightning()),
        ("full_attention", "full", attention.softmax(theta, rotary_dim, qk_norm=False)),
    ):
        residual = layers.Residual(
            source="normed",
            mixer_alpha=fields.number(f"{kind}_attn_alpha_factor"),
            mixer_beta=fields.number(f"{kind}_attn_beta_factor"),
            ffn_alpha=fields.number("mlp_alpha_factor"),
            ffn_beta=fields.number("mlp_beta_factor"),
        )
        kinds[code] = layers.Layer(mixer=mixer, ffn=ffn, residual=residual)
    count = common.read_num_layers(fields)
    all_layers = fields.sequence("layer_types", count, kinds)
    if "attn_type_list" in fields.values:
        codes = {0: kinds["linear_attention"], 1: kinds["full_attention"]}
        if fields.sequence("attn_type_list", count, codes) != all_layers:
            fields.fail("attn_type_list", "absent or the same as layer_types", "another order")
    return common.read_model(fields, all_layers)


def write(config: model.ModelConfig) -> dict:
    """The inverse of `read`; ValueError if transformers' `minimax` cannot be this model."""
    found = common.parts(config)
    for is_wrong, what in (
        (not isinstance(found.ffn.router, layers.SoftmaxTopK), "sigmoid routing"),
        (found.softmax is not None and found.softmax.qk_norm, "query-key norms"),
        (found.ffn.shared is not None, "a shared expert"),
        (found.residual.source != "normed", "a residual that is not normalised"),
    ):
        if is_wrong:
            raise ValueError(
                f"transformers' `minimax` has no field for {what}. Save as hf-original or "
                "orbax instead."
            )
    scale = common.factors(found)
    theta, rotary_dim = common.rope_of(found)
    head_dim = found.attention.head_dim
    names = {
        layers.LightningAttention: "linear_attention",
        layers.SoftmaxAttention: "full_attention",
    }
    result = {
        "architectures": ["MiniMaxForCausalLM"],
        "block_size": BLOCK_SIZE,
        "full_attn_alpha_factor": scale["full_alpha"],
        "full_attn_beta_factor": scale["full_beta"],
        "layer_types": [names[type(layer.mixer)] for layer in config.layers],
        "linear_attn_alpha_factor": scale["linear_alpha"],
        "linear_attn_beta_factor": scale["linear_beta"],
        "mlp_alpha_factor": scale["ffn_alpha"],
        "mlp_beta_factor": scale["ffn_beta"],
        "model_type": "minimax",
        "postnorm": True,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "sliding_window": None,
    } | common.write_shared(config, found)
    if rotary_dim != head_dim:
        # transformers reads it and rotates the whole head all the same (up to 5.23 at least).
        result["rotary_dim"] = rotary_dim
    return result
