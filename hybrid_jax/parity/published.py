"""Read a Hugging Face directory for the PyTorch reference: `config.json` and safetensors.

It shares no code with `hybrid_jax.config` and `hybrid_jax.checkpoint` on purpose: a misread field
or a transposed tensor there must not be misread here in the same way.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

# torch.Tensor, named here so that importing this file needs no PyTorch.
Tensor = Any

LIGHTNING, SOFTMAX = "lightning", "softmax"

# Derived tensors that some writers store; none of them is a weight.
DERIVED = re.compile(r"\.(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What the reference must know of a model, by the words of `config.json`."""

    dialect: str
    mixers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    qk_norm: bool
    experts: int
    experts_per_token: int
    sigmoid_router: bool
    postnorm: bool
    alpha_beta: dict[str, tuple[float, float]]
    norm_eps: float
    tied: bool
    vocab_size: int

    @property
    def num_layers(self) -> int:
        return len(self.mixers)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` names the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; only Hugging Face directories are compared."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} is not JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(value).__name__}.")
    return value


def read_spec(directory: pathlib.Path) -> Spec:
    """The `Spec` of a directory in any of the three published dialects of `config.json`."""
    path = directory / "config.json"
    config = read_json(path)
    model_type = str(config.get("model_type", "")).lower()
    # M2's first release called itself `minimax`; its class name tells the two apart.
    if config.get("architectures") == ["MiniMaxM2ForCausalLM"]:
        model_type = "minimax_m2"
    read = _DIALECTS.get(model_type)
    if read is None:
        raise ValueError(
            f"{path} has model_type {config.get('model_type')!r}; "
            f"the reference knows {', '.join(sorted(_DIALECTS))}."
        )
    try:
        return read(config)
    except KeyError as missing:
        raise ValueError(f"{path} has no field {missing.args[0]!r}.") from None


def _common(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary_dim = config.get("rotary_dim")
    if rotary_dim is None:
        factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        rotary_dim = int(head_dim * factor)
    return {
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "rope_theta": float(rope.get("rope_theta") or config["rope_theta"]),
        "experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "norm_eps": config["rms_norm_eps"],
        "tied": bool(config.get("tie_word_embeddings", False)),
        "vocab_size": config["vocab_size"],
    }


def _original(config: dict[str, Any]) -> Spec:
    """Text-01 and M1 as released: `attn_type_list` with 0 for lightning and 1 for softmax."""

    def pair(part: str) -> tuple[float, float]:
        return config[f"layernorm_{part}_alpha"], config[f"layernorm_{part}_beta"]

    mixers = tuple((LIGHTNING, SOFTMAX)[kind] for kind in config["attn_type_list"])
    if len(mixers) != config["num_hidden_layers"]:
        raise ValueError(
            f"attn_type_list has {len(mixers)} entries for {config['num_hidden_layers']} layers."
        )
    return Spec(
        dialect="original",
        mixers=mixers,
        qk_norm=False,
        sigmoid_router=False,
        postnorm=bool(config.get("postnorm", False)),
        alpha_beta={
            LIGHTNING: pair("linear_attention"),
            SOFTMAX: pair("full_attention"),
            "ffn": pair("mlp"),
        },
        **_common(config),
    )


def _native(config: dict[str, Any]) -> Spec:
    """The `minimax` of transformers, whose residual is always the normalised tensor."""
    kinds = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}

    def pair(part: str) -> tuple[float, float]:
        return config.get(f"{part}_alpha_factor", 1.0), config.get(f"{part}_beta_factor", 1.0)

    return Spec(
        dialect="minimax",
        mixers=tuple(kinds[kind] for kind in config["layer_types"]),
        qk_norm=False,
        sigmoid_router=False,
        postnorm=True,
        alpha_beta={
            LIGHTNING: pair("linear_attn"),
            SOFTMAX: pair("full_attn"),
            "ffn": pair("mlp"),
        },
        **_common(config),
    )


def _m2(config: dict[str, Any]) -> Spec:
    """M2: softmax attention throughout, normed q and k, sigmoid router, pre-norm residual."""
    one = (1.0, 1.0)
    return Spec(
        dialect="minimax_m2",
        mixers=(SOFTMAX,) * config["num_hidden_layers"],
        qk_norm=bool(config.get("use_qk_norm", True)),
        sigmoid_router=True,
        postnorm=False,
        alpha_beta={LIGHTNING: one, SOFTMAX: one, "ffn": one},
        **_common(config),
    )


# The released configs carry both the model types and the names of their config classes.
_DIALECTS = {
    "minimax_text_01": _original,
    "minimaxtext01": _original,
    "minimax_m1": _original,
    "minimaxm1": _original,
    "minimax": _native,
    "minimax_m2": _m2,
}


def read_weights(directory: pathlib.Path, spec: Spec, dtype: str) -> dict[str, Tensor]:
    """Every weight by its published name, in one dtype, FP8 blocks multiplied by their scales."""
    import torch

    raw = _read_safetensors(directory)
    block = _weight_block(directory)
    weights: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if DERIVED.search(name) or (layer and int(layer[1]) >= spec.num_layers):
            continue
        if name.endswith(".weight_scale_inv"):
            continue
        value = tensor.to(getattr(torch, dtype))
        scale = raw.get(f"{name}_scale_inv")
        if scale is not None:
            scale = scale.to(value.dtype)
            for dim, size in enumerate(block):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, value.shape[dim])
            value = value * scale
        weights |= by_released_name(name, value)
    return weights


def by_released_name(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by the released names: what transformers fuses comes apart, w1 before w3."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if not fused:
        return {name: tensor}
    parts = ("w1", "w3") if fused[2] == "gate_up_proj" else ("w2",)
    return {
        f"{fused[1]}.{expert}.{part}.weight": matrix
        for expert, both in enumerate(tensor)
        for part, matrix in zip(parts, both.chunk(len(parts)), strict=True)
    }


def _weight_block(directory: pathlib.Path) -> tuple[int, int]:
    quantization = read_json(directory / "config.json").get("quantization_config") or {}
    return tuple(quantization.get("weight_block_size") or (128, 128))


def _read_safetensors(directory: pathlib.Path) -> dict[str, Tensor]:
    from safetensors import torch as safetensors_torch

    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= safetensors_torch.load_file(directory / file)
    return tensors
