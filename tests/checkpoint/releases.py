"""The released checkpoints at their true size, tensor by tensor, from their published tables.

Written from the index of MiniMax-M1, the loaders of vLLM and the model cards, never from the
package's own rules: (pattern, shape, dtype) with the layers and experts that a pattern runs over.
Weights are holes in sparse files, so that 912 GB take the room of their headers.
"""

import itertools
import json
import os
import pathlib

from tests.checkpoint import published

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
LAYERS = range(80)
FULL = range(7, 80, 8)
LINEAR = [n for n in LAYERS if n not in FULL]
# name, shape, dtype, layers (None: outside of them), experts.
TEXT_01 = [
    ("model.embed_tokens.weight", (200064, 6144), "BF16", None, None),
    ("model.norm.weight", (6144,), "BF16", None, None),
    ("lm_head.weight", (200064, 6144), "BF16", None, None),
    ("input_layernorm.weight", (6144,), "BF16", LAYERS, None),
    ("post_attention_layernorm.weight", (6144,), "BF16", LAYERS, None),
    ("self_attn.qkv_proj.weight", (24576, 6144), "BF16", LINEAR, None),
    ("self_attn.output_gate.weight", (8192, 6144), "BF16", LINEAR, None),
    ("self_attn.norm.weight", (8192,), "BF16", LINEAR, None),
    ("self_attn.out_proj.weight", (6144, 8192), "BF16", LINEAR, None),
    ("self_attn.q_proj.weight", (8192, 6144), "BF16", FULL, None),
    ("self_attn.k_proj.weight", (1024, 6144), "BF16", FULL, None),
    ("self_attn.v_proj.weight", (1024, 6144), "BF16", FULL, None),
    ("self_attn.o_proj.weight", (6144, 8192), "BF16", FULL, None),
    ("block_sparse_moe.gate.weight", (32, 6144), "F32", LAYERS, None),
    ("w1.weight", (9216, 6144), "BF16", LAYERS, 32),
    ("w3.weight", (9216, 6144), "BF16", LAYERS, 32),
    ("w2.weight", (6144, 9216), "BF16", LAYERS, 32),
]
M2_LAYERS = range(62)
M2 = [
    ("model.embed_tokens.weight", (200064, 3072), "BF16", None, None),
    ("model.norm.weight", (3072,), "BF16", None, None),
    ("lm_head.weight", (200064, 3072), "BF16", None, None),
    ("input_layernorm.weight", (3072,), "BF16", M2_LAYERS, None),
    ("post_attention_layernorm.weight", (3072,), "BF16", M2_LAYERS, None),
    ("self_attn.q_proj.weight", (6144, 3072), "F8_E4M3", M2_LAYERS, None),
    ("self_attn.q_proj.weight_scale_inv", (48, 24), "F32", M2_LAYERS, None),
    ("self_attn.k_proj.weight", (1024, 3072), "F8_E4M3", M2_LAYERS, None),
    ("self_attn.k_proj.weight_scale_inv", (8, 24), "F32", M2_LAYERS, None),
    ("self_attn.v_proj.weight", (1024, 3072), "F8_E4M3", M2_LAYERS, None),
    ("self_attn.v_proj.weight_scale_inv", (8, 24), "F32", M2_LAYERS, None),
    ("self_attn.o_proj.weight", (3072, 6144), "F8_E4M3", M2_LAYERS, None),
    ("self_attn.o_proj.weight_scale_inv", (24, 48), "F32", M2_LAYERS, None),
    ("self_attn.q_norm.weight", (6144,), "BF16", M2_LAYERS, None),
    ("self_attn.k_norm.weight", (1024,), "BF16", M2_LAYERS, None),
    ("block_sparse_moe.gate.weight", (256, 3072), "F32", M2_LAYERS, None),
    ("block_sparse_moe.e_score_correction_bias", (256,), "F32", M2_LAYERS, None),
    ("w1.weight", (1536, 3072), "F8_E4M3", M2_LAYERS, 256),
    ("w1.weight_scale_inv", (12, 24), "F32", M2_LAYERS, 256),
    ("w3.weight", (1536, 3072), "F8_E4M3", M2_LAYERS, 256),
    ("w3.weight_scale_inv", (12, 24), "F32", M2_LAYERS, 256),
    ("w2.weight", (3072, 1536), "F8_E4M3", M2_LAYERS, 256),
    ("w2.weight_scale_inv", (24, 12), "F32", M2_LAYERS, 256),
]
TOWER = "vision_tower.vision_model"
VISION = {
    f"{TOWER}.embeddings.class_embedding": (1024,),
    f"{TOWER}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    f"{TOWER}.embeddings.position_embedding.weight": (577, 1024),
    f"{TOWER}.pre_layrnorm.weight": (1024,),
    f"{TOWER}.pre_layrnorm.bias": (1024,),
    "multi_modal_projector.linear_1.weight": (6144, 1024),
    "multi_modal_projector.linear_1.bias": (6144,),
    "multi_modal_projector.linear_2.weight": (6144, 6144),
    "multi_modal_projector.linear_2.bias": (6144,),
    "image_newline": (6144,),
}
VISION_LAYER = {f"self_attn.{part}_proj": (1024, 1024) for part in ("q", "k", "v", "out")} | {
    "layer_norm1": (1024,),
    "layer_norm2": (1024,),
    "mlp.fc1": (4096, 1024),
    "mlp.fc2": (1024, 4096),
}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def text_01() -> Tensors:
    """Name -> (dtype, shape) of Text-01 and M1."""
    return _written_out(TEXT_01)


def m2() -> Tensors:
    """The same of M2, in FP8."""
    return _written_out(M2)


def vl_01() -> Tensors:
    """The same of VL-01: the names of Text-01 behind a prefix, and the vision part."""
    found = {f"language_model.{name}": form for name, form in text_01().items()}
    vision = dict(VISION)
    for n, (name, shape) in itertools.product(range(24), VISION_LAYER.items()):
        vision[f"{TOWER}.encoder.layers.{n}.{name}.weight"] = shape
        vision[f"{TOWER}.encoder.layers.{n}.{name}.bias"] = shape[:1]
    return found | {name: ("BF16", shape) for name, shape in vision.items()}


def text_01_config() -> dict:
    """config.json of Text-01 as released."""
    alpha = 3.5565588200778455
    factors = ("full_attention", "linear_attention", "mlp")
    return published.original_config(
        architectures=["MiniMaxText01ForCausalLM"],
        attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1] * 10,
        head_dim=128,
        hidden_size=6144,
        intermediate_size=9216,
        max_position_embeddings=10240000,
        model_type="minimax_text_01",
        num_attention_heads=64,
        num_hidden_layers=80,
        num_key_value_heads=8,
        num_local_experts=32,
        rotary_dim=64,
        vocab_size=200064,
        **{f"layernorm_{name}_alpha": alpha for name in factors},
        **{f"layernorm_{name}_beta": 1.0 for name in factors},
    )


def m2_config() -> dict:
    """config.json of M2 as released."""
    return published.m2_config(
        62,
        head_dim=128,
        hidden_size=3072,
        intermediate_size=1536,
        num_attention_heads=48,
        num_experts_per_tok=8,
        num_key_value_heads=8,
        num_local_experts=256,
        quantization_config=published.FP8_CONFIG | {"weight_block_size": [128, 128]},
        rotary_dim=64,
        vocab_size=200064,
    )


def vl_01_config(text: dict | None = None) -> dict:
    """config.json of VL-01, around that of its language model."""
    text = text_01_config() | {"max_position_embeddings": 8192} if text is None else text
    return {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_minimax_vl_01.MiniMaxVL01Config"},
        "ignore_index": -100,
        "image_grid_pinpoints": [[336, 336], [336, 672]],
        "image_seq_length": 576,
        "image_token_index": 200025,
        "model_type": "minimax_vl_01",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text | {"shared_intermediate_size": [0]},
        "transformers_version": "4.45.2",
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 6144,
            "vocab_size": 32000,
        },
    }


def numbers(tensors: Tensors) -> int:
    """Numbers in all."""
    return sum(_size(shape) for _, shape in tensors.values())


def num_bytes(tensors: Tensors) -> int:
    """Bytes in all."""
    return sum(BYTES[dtype] * _size(shape) for dtype, shape in tensors.values())


def write_index(path, config: dict, tensors: Tensors) -> pathlib.Path:
    """A directory of config.json and an index that names files of 5 GB, and nothing else."""
    path = pathlib.Path(path)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    dealt = _dealt(tensors)
    names = [f"model-{n + 1:05d}-of-{len(dealt):05d}.safetensors" for n in range(len(dealt))]
    weight_map = {name: file for file, shard in zip(names, dealt) for name in shard}
    index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_sparse(path, config: dict, tensors: Tensors) -> pathlib.Path:
    """The same with its shards: true headers, and holes for weights."""
    path = write_index(path, config, tensors)
    dealt = _dealt(tensors)
    for n, shard in enumerate(dealt):
        entries, place = {}, 0
        for name in shard:
            dtype, shape = tensors[name]
            end = place + BYTES[dtype] * _size(shape)
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
            place = end
        head = published.header(entries)
        file = path / f"model-{n + 1:05d}-of-{len(dealt):05d}.safetensors"
        file.write_bytes(head)
        os.truncate(file, len(head) + place)
    return path


def _written_out(rows) -> Tensors:
    found: Tensors = {}
    for name, shape, dtype, layers, experts in rows:
        if layers is None:
            found[name] = dtype, shape
        elif experts is None:
            found |= {f"model.layers.{n}.{name}": (dtype, shape) for n in layers}
        else:
            for n, e in itertools.product(layers, range(experts)):
                found[f"model.layers.{n}.block_sparse_moe.experts.{e}.{name}"] = dtype, shape
    return found


def _dealt(tensors: Tensors, most: int = 5_000_000_000) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * _size(shape)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
