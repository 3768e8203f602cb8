"""The published models of the MiniMax family; every number has its source beside it."""

from hybrid_jax.config import layers, model


def _deepnorm(num_layers: int) -> layers.Residual:
    # config.json: postnorm true; layernorm_{full,linear}_attention_alpha and layernorm_mlp_alpha
    # are 3.5565588200778455 = (2 * 80) ** 0.25, every beta 1.0.
    alpha = float((2 * num_layers) ** 0.25)
    return layers.Residual(source="normed", mixer_alpha=alpha, ffn_alpha=alpha)


def minimax_text_01(name: str = "minimax-text-01") -> model.ModelConfig:
    """MiniMax-Text-01: 456,089,655,296 parameters, 80 layers, 7 lightning to 1 softmax.

    Source: config.json of MiniMaxAI/MiniMax-Text-01 and github.com/MiniMax-AI/MiniMax-01 README.
    """
    ffn = layers.MoeFfn(
        num_experts=32,  # num_local_experts
        hidden_dim=9216,  # intermediate_size
        router=layers.SoftmaxTopK(experts_per_token=2),  # num_experts_per_tok
        shared=None,  # shared_intermediate_size 0
    )
    lightning = layers.LightningAttention(
        num_heads=64,  # num_attention_heads
        head_dim=128,  # head_dim
        # Default of the norm class in modeling_minimax_m1.py; the config's eps is not passed.
        norm_eps=1e-6,
    )
    softmax = layers.SoftmaxAttention(
        num_heads=64,  # num_attention_heads
        num_kv_heads=8,  # num_key_value_heads
        head_dim=128,  # head_dim
        rotary_dim=64,  # rotary_dim
        rope_theta=1e7,  # rope_theta
        qk_norm=False,
    )
    residual = _deepnorm(80)
    return model.ModelConfig(
        name=name,
        vocab_size=200064,  # vocab_size
        hidden_dim=6144,  # hidden_size
        pattern=(  # attn_type_list: [0, 0, 0, 0, 0, 0, 0, 1] repeated
            model.Run(layer=layers.Layer(mixer=lightning, ffn=ffn, residual=residual), count=7),
            model.Run(layer=layers.Layer(mixer=softmax, ffn=ffn, residual=residual), count=1),
        ),
        repeats=10,  # num_hidden_layers 80
        norm_eps=1e-5,  # rms_norm_eps
        tie_embeddings=False,  # tie_word_embeddings
        initializer_range=0.02,  # initializer_range
        max_positions=10240000,  # max_position_embeddings
        dtypes=model.Dtypes(parameters="bfloat16", compute="bfloat16"),
        remat="full",
    )


def minimax_m1_40k() -> model.ModelConfig:
    """MiniMax-M1 with a 40K thinking budget: the architecture of Text-01 (its config.json)."""
    return minimax_text_01("minimax-m1-40k")


def minimax_m1_80k() -> model.ModelConfig:
    """MiniMax-M1 with an 80K thinking budget: the architecture of Text-01 (its config.json)."""
    return minimax_text_01("minimax-m1-80k")


def minimax_m2(name: str = "minimax-m2", max_positions: int = 196608) -> model.ModelConfig:
    """MiniMax-M2: 228,689,764,864 parameters, 62 softmax layers, 256 experts.

    Source: config.json of MiniMaxAI/MiniMax-M2 and configuration_minimax_m2.py of transformers.
    """
    layer = layers.Layer(
        mixer=layers.SoftmaxAttention(
            num_heads=48,  # num_attention_heads
            num_kv_heads=8,  # num_key_value_heads
            head_dim=128,  # head_dim
            rotary_dim=64,  # rotary_dim
            rope_theta=5e6,  # rope_theta
            qk_norm=True,  # use_qk_norm, qk_norm_type per_layer: over the whole projection
        ),
        ffn=layers.MoeFfn(
            num_experts=256,  # num_local_experts
            hidden_dim=1536,  # intermediate_size
            router=layers.SigmoidTopK(experts_per_token=8),  # scoring_func, use_routing_bias
            shared=None,  # shared_intermediate_size 0
        ),
        residual=layers.Residual(source="input"),  # plain pre-norm
    )
    return model.ModelConfig(
        name=name,
        vocab_size=200064,  # vocab_size
        hidden_dim=3072,  # hidden_size
        pattern=(model.Run(layer=layer, count=1),),  # attn_type_list: 62 x 1
        repeats=62,  # num_hidden_layers
        norm_eps=1e-6,  # rms_norm_eps
        tie_embeddings=False,  # tie_word_embeddings
        initializer_range=0.02,  # initializer_range
        max_positions=max_positions,  # max_position_embeddings
        dtypes=model.Dtypes(parameters="bfloat16", compute="bfloat16"),
        remat="full",
    )


def minimax_m2_1() -> model.ModelConfig:
    """MiniMax-M2.1: M2's architecture and limits."""
    return minimax_m2("minimax-m2.1")


def minimax_m2_5() -> model.ModelConfig:
    """MiniMax-M2.5: M2's architecture and limits."""
    return minimax_m2("minimax-m2.5")


def minimax_m2_7() -> model.ModelConfig:
    """MiniMax-M2.7: M2's architecture with max_position_embeddings 204800."""
    return minimax_m2("minimax-m2.7", max_positions=204800)
