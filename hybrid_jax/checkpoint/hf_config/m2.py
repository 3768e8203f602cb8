"""config.json of MiniMax-M2 and its successors, as released and as transformers writes it."""

from hybrid_jax.checkpoint.hf_config import common
from hybrid_jax.checkpoint.hf_config.fields import Fields, rope
from hybrid_jax.config import layers, model


def read(fields: Fields) -> model.ModelConfig:
    """The model that a config.json describes; without a rotary size, the whole head is rotated."""
    attention = common.read_attention(fields)
    theta, rotary_dim = rope(fields, attention.head_dim, attention.head_dim)
    fields.only("scoring_func", "sigmoid")
    fields.only("use_routing_bias", True)
    fields.only("qk_norm_type", "per_layer")
    fields.only("shared_intermediate_size", 0, [0])
    # In the released file but without effect: no shared expert, no residual factors, no dense
    # layer, and multi-token-prediction modules that were never published.
    for kind in ("full_attention", "linear_attention", "mlp"):
        fields.only(f"layernorm_{kind}_alpha", 1.0)
        fields.only(f"layernorm_{kind}_beta", 1.0)
    for name in (
        "shared_moe_mode", "mlp_intermediate_size", "use_mtp", "num_mtp_modules",
        "mtp_transformer_layers",
    ):  # fmt: skip
        fields.get(name)
    layer = layers.Layer(
        mixer=attention.softmax(theta, rotary_dim, qk_norm=fields.flag("use_qk_norm", True)),
        ffn=common.read_moe(fields, layers.SigmoidTopK),
        residual=layers.Residual(source="input"),
    )
    count = common.read_num_layers(fields)
    if "attn_type_list" in fields.values:
        fields.sequence("attn_type_list", count, {1: layer})
    return common.read_model(fields, [layer] * count)


def write(config: model.ModelConfig, *, native: bool) -> dict:
    """The inverse of `read`, in transformers' spelling or in the released one.

    ValueError if the model is not of this family.
    """
    found = common.parts(config)
    softmax, plain = found.softmax, layers.Residual(source="input")
    is_m2 = found.lightning is None and found.residual == plain and found.ffn.shared is None
    if softmax is None or not is_m2:
        raise ValueError(
            "M2's config.json describes softmax layers with plain residuals and no shared expert; "
            "this model is another. Save as orbax instead."
        )
    if native and not softmax.qk_norm:
        raise ValueError(
            "transformers' `minimax_m2` always has query-key norms; this model has none. Save as "
            "hf-original or orbax instead."
        )
    theta, rotary_dim = common.rope_of(found)
    result = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "rotary_dim": rotary_dim,
    } | common.write_shared(config, found)
    if native:
        rope_parameters = {"rope_theta": theta, "rope_type": "default"}
        factor = rotary_dim / softmax.head_dim
        return result | {"rope_parameters": rope_parameters | {"partial_rotary_factor": factor}}
    return result | {
        "attn_type_list": [1] * config.num_layers,
        "qk_norm_type": "per_layer",
        "rope_theta": theta,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_qk_norm": softmax.qk_norm,
        "use_routing_bias": True,
    }
