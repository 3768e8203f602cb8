"""config.json as MiniMax released it with Text-01 and M1."""

from hybrid_jax.checkpoint.hf_config import common, native
from hybrid_jax.checkpoint.hf_config.fields import Fields, rope
from hybrid_jax.config import layers, model

MODEL_TYPES = ("minimax_text_01", "minimax_m1")
_ARCHITECTURES = {
    "minimax_text_01": "MiniMaxText01ForCausalLM",
    "minimax_m1": "MiniMaxM1ForCausalLM",
}


def read(fields: Fields) -> model.ModelConfig:
    """The model that a config.json describes.

    `postnorm` and the six factors are required: each has a default in some reader (false, 1), the
    released files give them all, and without them the network is another one.
    """
    attention = common.read_attention(fields)
    theta, rotary_dim = rope(fields, attention.head_dim, attention.head_dim)
    source = "normed" if fields.flag("postnorm") else "input"
    ffn = _with_shared(fields, common.read_moe(fields, layers.SoftmaxTopK))
    kinds = {}
    for code, kind, mixer in (
        (0, "linear", attention.lightning()),
        (1, "full", attention.softmax(theta, rotary_dim, qk_norm=False)),
    ):
        residual = layers.Residual(
            source=source,
            mixer_alpha=fields.number(f"layernorm_{kind}_attention_alpha"),
            mixer_beta=fields.number(f"layernorm_{kind}_attention_beta"),
            ffn_alpha=fields.number("layernorm_mlp_alpha"),
            ffn_beta=fields.number("layernorm_mlp_beta"),
        )
        kinds[code] = layers.Layer(mixer=mixer, ffn=ffn, residual=residual)
    # The released code fixes its block at 256; it does not change the numbers.
    fields.size("block_size", None, most=native.MAX_BLOCK_SIZE)
    all_layers = fields.sequence("attn_type_list", common.read_num_layers(fields), kinds)
    return common.read_model(fields, all_layers)


def _with_shared(fields: Fields, ffn: layers.MoeFfn) -> layers.MoeFfn:
    fields.only("shared_moe_mode", "sigmoid")
    width = fields.get("shared_intermediate_size", 0)
    # VL-01's text config holds a list of one.
    width = width[0] if isinstance(width, list) and len(width) == 1 else width
    if type(width) is not int or width < 0:
        fields.fail("shared_intermediate_size", "a whole number >= 0", width)
    if not width:
        return ffn
    return layers.MoeFfn(
        num_experts=ffn.num_experts,
        hidden_dim=ffn.hidden_dim,
        router=ffn.router,
        shared=layers.SharedExpert(hidden_dim=width),
    )


def write(config: model.ModelConfig, model_type: str) -> dict:
    """The inverse of `read`; ValueError if the model is not of this family."""
    found = common.parts(config)
    if not isinstance(found.ffn.router, layers.SoftmaxTopK) or (
        found.softmax and found.softmax.qk_norm
    ):
        raise ValueError(
            "The config of Text-01, M1 and VL-01 has no field for sigmoid routing or query-key "
            "norms. Save M2 as hf-original, and other models as orbax."
        )
    scale = common.factors(found)
    theta, rotary_dim = common.rope_of(found)
    shared = found.ffn.shared
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "attn_type_list": [
            int(isinstance(layer.mixer, layers.SoftmaxAttention)) for layer in config.layers
        ],
        "layernorm_full_attention_alpha": scale["full_alpha"],
        "layernorm_full_attention_beta": scale["full_beta"],
        "layernorm_linear_attention_alpha": scale["linear_alpha"],
        "layernorm_linear_attention_beta": scale["linear_beta"],
        "layernorm_mlp_alpha": scale["ffn_alpha"],
        "layernorm_mlp_beta": scale["ffn_beta"],
        "model_type": model_type,
        "postnorm": found.residual.source == "normed",
        "rope_theta": theta,
        "rotary_dim": rotary_dim,
        "shared_intermediate_size": shared.hidden_dim if shared else 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
    } | common.write_shared(config, found)
