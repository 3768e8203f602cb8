"""Tiny random Hugging Face directories: two kinds saved by transformers, one as released."""

import json
import pathlib
from typing import Any

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Factors unlike each other and unlike 1, so that no two of them can be exchanged unseen.
NATIVE_FACTORS = {
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.9,
    "linear_attn_alpha_factor": 1.6,
    "linear_attn_beta_factor": 1.1,
    "mlp_alpha_factor": 1.4,
    "mlp_beta_factor": 0.8,
}


def randomise(parameters: dict[str, Any], seed: int) -> None:
    """Fill by name: matrices at unit gain, norm scales around 1, a bias that changes choices."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        tensor = parameters[name]
        normal = torch.randn(tensor.shape, generator=draw)
        if tensor.ndim == 1:
            value = 1.0 + 0.3 * normal
        elif "embed_tokens" in name:
            value = normal
        else:
            value = normal / tensor.shape[-1] ** 0.5
        tensor.data.copy_(0.3 * normal if "correction_bias" in name else value)


def save_minimax(
    path: pathlib.Path,
    *,
    pattern: str = "lls",
    seed: int = 0,
    dtype: str = "float32",
    **overrides,
) -> None:
    """`MiniMaxForCausalLM` saved by transformers; `pattern` has l for lightning, s for softmax."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    kinds = {"l": "linear_attention", "s": "full_attention"}
    fields = SHAPE | NATIVE_FACTORS | {"rope_parameters": rope(10000.0)} | overrides
    config = MiniMaxConfig(
        num_hidden_layers=len(pattern), layer_types=[kinds[kind] for kind in pattern], **fields
    )
    _save(MiniMaxForCausalLM(config), path, seed, dtype)


def save_minimax_m2(path: pathlib.Path, *, num_layers: int = 2, seed: int = 0, **overrides) -> None:
    """`MiniMaxM2ForCausalLM` saved by transformers, rotary over half the head as in M2."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    fields = SHAPE | {"rope_parameters": rope(10000.0), "rotary_dim": 8} | overrides
    _save(MiniMaxM2ForCausalLM(MiniMaxM2Config(num_hidden_layers=num_layers, **fields)), path, seed)


def save_minimax_m2_fp8(path: pathlib.Path, **fields) -> None:
    """M2 as released: FP8 matrices with a float32 scale for each block of 128 x 128."""
    import torch
    from safetensors.torch import load_file, save_file

    # Wide enough for two blocks, the second one cut short.
    save_minimax_m2(path, **({"hidden_size": 160} | fields))
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if not name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            tensors[name] = tensor
            continue
        rows, columns = (range(0, size, 128) for size in tensor.shape)
        blocks = [[tensor[r : r + 128, c : c + 128] for c in columns] for r in rows]
        scales = [[block.abs().max() / 448 for block in row] for row in blocks]
        scaled = [
            torch.cat([block / scale for block, scale in zip(*pair, strict=True)], 1)
            for pair in zip(blocks, scales, strict=True)
        ]
        tensors[name] = torch.cat(scaled).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.tensor(scales)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _save(model: Any, path: pathlib.Path, seed: int, dtype: str = "float32") -> None:
    import torch

    buffers = {n: b for n, b in model.named_buffers() if "correction_bias" in n}
    randomise(dict(model.named_parameters()) | buffers, seed)
    # With the model go the decay buffers, in bfloat16 too.
    model.to(getattr(torch, dtype)).save_pretrained(path)


def save_original(
    path: pathlib.Path,
    *,
    pattern: str = "lls",
    seed: int = 0,
    shared: int = 0,
    qkv_gain: float = 1.0,
    **overrides,
) -> None:
    """A directory as Text-01 and M1 were released: their `config.json` and their names."""
    import torch
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "model_type": "minimax_m1",
        "num_hidden_layers": len(pattern),
        "attn_type_list": ["ls".index(kind) for kind in pattern],
        "hidden_act": "silu",
        "rotary_dim": 8,
        "rope_theta": 10000,
        "postnorm": True,
        "shared_intermediate_size": shared,
        "shared_moe_mode": "sigmoid",
        "layernorm_full_attention_alpha": 1.3,
        "layernorm_full_attention_beta": 0.9,
        "layernorm_linear_attention_alpha": 1.6,
        "layernorm_linear_attention_beta": 1.1,
        "layernorm_mlp_alpha": 1.4,
        "layernorm_mlp_beta": 0.8,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "use_cache": True,
        **SHAPE,
        **overrides,
    }
    tensors = {n: torch.empty(s) for n, s in _original_shapes(config, pattern, shared).items()}
    randomise(tensors, seed)
    for name in tensors:
        if "qkv_proj" in name:
            tensors[name] *= qkv_gain
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))


def _original_shapes(config: dict[str, Any], pattern: str, shared: int) -> dict[str, tuple]:
    width, heads, head_dim = (config[n] for n in ("hidden_size", "num_attention_heads", "head_dim"))
    full, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    hidden, experts = config["intermediate_size"], config["num_local_experts"]
    mixers = {
        "l": {
            "qkv_proj": (3 * full, width),
            "output_gate": (full, width),
            "norm": (full,),
            "out_proj": (width, full),
        },
        "s": {
            "q_proj": (full, width),
            "k_proj": (kv, width),
            "v_proj": (kv, width),
            "o_proj": (width, full),
        },
    }
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }
    for layer, kind in enumerate(pattern):
        own = {f"self_attn.{name}": shape for name, shape in mixers[kind].items()}
        own |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        own["block_sparse_moe.gate"] = (experts, width)
        for expert in range(experts):
            own |= {f"block_sparse_moe.experts.{expert}.w{i}": (hidden, width) for i in (1, 3)}
            own[f"block_sparse_moe.experts.{expert}.w2"] = (width, hidden)
        if shared:
            own |= {f"shared_mlp.{name}_proj": (shared, width) for name in ("gate", "up")}
            own |= {"shared_mlp.down_proj": (width, shared), "coefficient": (1, width)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes
