"""Tiny published directories without PyTorch, by a writer of their own and shapes from the release.

The writer shares no code with the package: a mistake would have to be made twice.
"""

import json
import pathlib

import ml_dtypes
import numpy as np

TAGS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int32): "I32",
}
D, H, G, K, E, F, W = 12, 4, 2, 6, 3, 10, 32


def header(entries: dict, metadata=True) -> bytes:
    """The 8-byte length and the JSON of a safetensors file."""
    raw = json.dumps(({"__metadata__": {"format": "pt"}} if metadata else {}) | entries).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_safetensors(path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file."""
    entries, place, data = {}, 0, []
    for name, array in tensors.items():
        shape, end = list(array.shape), place + array.nbytes
        entries[name] = {"dtype": TAGS[array.dtype], "shape": shape, "data_offsets": [place, end]}
        data.append(array.tobytes())
        place = end
    pathlib.Path(path).write_bytes(header(entries) + b"".join(data))


def write_directory(path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1):
    """config.json and the tensors, in one file or dealt out to shards with an index."""
    path = pathlib.Path(path)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write_safetensors(path / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def original_config(pattern: str = "lls", **changes) -> dict:
    """config.json as released with M1, tiny; None as a change removes the field."""
    config = {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_type_list": ["ls".index(kind) for kind in pattern],
        "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
        "bos_token_id": None,
        "eos_token_id": 7,
        "head_dim": K,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "layernorm_full_attention_alpha": 1.3,
        "layernorm_full_attention_beta": 0.9,
        "layernorm_linear_attention_alpha": 1.6,
        "layernorm_linear_attention_beta": 1.1,
        "layernorm_mlp_alpha": 1.4,
        "layernorm_mlp_beta": 0.8,
        "max_position_embeddings": 4096,
        "model_type": "minimax_m1",
        "num_attention_heads": H,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": G,
        "num_local_experts": E,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "rotary_dim": 4,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.2",
        "use_cache": True,
        "vocab_size": W,
    }
    return {name: value for name, value in (config | changes).items() if value is not ...}


def native_config(pattern: str = "lls", **changes) -> dict:
    """config.json as transformers 5.23 writes it for `minimax`, tiny."""
    kinds = {"l": "linear_attention", "s": "full_attention"}
    config = {
        "architectures": ["MiniMaxForCausalLM"],
        "attention_dropout": 0.0,
        "block_size": 8,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "full_attn_alpha_factor": 1.3,
        "full_attn_beta_factor": 1,
        "head_dim": K,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "layer_types": [kinds[kind] for kind in pattern],
        "linear_attn_alpha_factor": 1.6,
        "linear_attn_beta_factor": 1.1,
        "max_position_embeddings": 4096,
        "mlp_alpha_factor": 1,
        "mlp_beta_factor": 1,
        "model_type": "minimax",
        "num_attention_heads": H,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": G,
        "num_local_experts": E,
        "output_router_logits": False,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": W,
    }
    return {name: value for name, value in (config | changes).items() if value is not ...}


def m2_config(layers: int = 2, **changes) -> dict:
    """config.json as released with M2, tiny."""
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * layers,
        "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
        "head_dim": K,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "layernorm_full_attention_beta": 1.0,
        "max_position_embeddings": 196608,
        "mlp_intermediate_size": 8192,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": H,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": G,
        "num_local_experts": E,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": 4,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": W,
    }
    return {name: value for name, value in (config | changes).items() if value is not ...}


FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "float8_e4m3fn",
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [8, 4],
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, from the tables of the release."""
    d, h, g, k = D, config["num_attention_heads"], config["num_key_value_heads"], K
    e, f, w = config["num_local_experts"], config["intermediate_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": (w, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (w, d)
    kinds = config.get("attn_type_list") or [
        int(kind == "full_attention") for kind in config["layer_types"]
    ]
    for n, kind in enumerate(kinds):
        layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        if kind == 0:
            layer |= {
                "self_attn.qkv_proj.weight": (3 * h * k, d),
                "self_attn.output_gate.weight": (h * k, d),
                "self_attn.norm.weight": (h * k,),
                "self_attn.out_proj.weight": (d, h * k),
            }
        else:
            layer |= {
                "self_attn.q_proj.weight": (h * k, d),
                "self_attn.k_proj.weight": (g * k, d),
                "self_attn.v_proj.weight": (g * k, d),
                "self_attn.o_proj.weight": (d, h * k),
            }
        if config["model_type"] == "minimax_m2":
            layer |= {
                "self_attn.q_norm.weight": (h * k,),
                "self_attn.k_norm.weight": (g * k,),
                "block_sparse_moe.e_score_correction_bias": (e,),
            }
        layer["block_sparse_moe.gate.weight"] = (e, d)
        for expert in range(e):
            for part, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                layer[f"block_sparse_moe.experts.{expert}.{part}.weight"] = shape
        if shared := config.get("shared_intermediate_size"):
            layer |= {
                "shared_mlp.gate_proj.weight": (shared, d),
                "shared_mlp.up_proj.weight": (shared, d),
                "shared_mlp.down_proj.weight": (d, shared),
                "coefficient.weight": (1, d),
            }
        found |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return found


def tensors(config: dict, dtype=ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors as released: routers and their biases in float32, the rest in `dtype`."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(config).items():
        value = draw.standard_normal(shape) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        kept = name.endswith((".gate.weight", "correction_bias"))
        found[name] = value.astype(np.float32 if kept else dtype)
    return found


def quantised(tensors: dict[str, np.ndarray], block=(8, 4)) -> dict[str, np.ndarray]:
    """The linear weights in FP8 with one random float32 scale a block, as M2 stores them."""
    draw = np.random.default_rng(1)
    found = {}
    for name, array in tensors.items():
        linear = "_proj." in name or ".experts." in name
        if not linear:
            found[name] = array
            continue
        found[name] = array.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        rows, columns = -(-array.shape[0] // block[0]), -(-array.shape[1] // block[1])
        scale = draw.uniform(0.5, 2.0, (rows, columns)).astype(np.float32)
        found[f"{name}_scale_inv"] = scale
    return found


def dequantised(tensors: dict[str, np.ndarray], name: str, block=(8, 4)) -> np.ndarray:
    """One FP8 weight in float32, element by element from the formula."""
    stored, scale = tensors[name].astype(np.float32), tensors[f"{name}_scale_inv"]
    i, j = np.indices(stored.shape)
    return stored * scale[i // block[0], j // block[1]]


def decay_buffers(config: dict) -> dict[str, np.ndarray]:
    """Stand-ins for the tables that transformers stores with every lightning layer."""
    draw = np.random.default_rng(2)
    h, size = config["num_attention_heads"], config.get("block_size", 8)
    found = {}
    for n, kind in enumerate(config["layer_types"]):
        if kind == "linear_attention":
            for name, shape in (
                ("slope_rate", (h, 1, 1)),
                ("query_decay", (h, size, 1)),
                ("key_decay", (h, size, 1)),
                ("diagonal_decay", (1, h, size, size)),
            ):
                values = draw.random(shape, np.float32)
                found[f"model.layers.{n}.self_attn.{name}"] = values
    return found


def read_directory(path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype tag, shape, bytes) of a directory, by a reader of its own."""
    found = {}
    for file in sorted(pathlib.Path(path).glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + place for place in entry["data_offsets"])
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[begin:end]
    return found


def stored(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What `read_directory` should give for these tensors."""
    return {
        n: (TAGS[a.dtype], a.shape, np.ascontiguousarray(a).tobytes()) for n, a in tensors.items()
    }
