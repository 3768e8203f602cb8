"""Published names of the family (Text-01, M1, M2), as every release and transformers store them.

Sources: `model.safetensors.index.json` of MiniMax-M1 (8243 names), the loaders of vLLM 0.22.1 and
0.33, and the conversion table of transformers 5.23. The fused names (`mlp.experts.gate_up_proj`)
are those of transformers' modules; its own saves use the released ones.
"""

import dataclasses
import re

from hybrid_jax.checkpoint.names.places import Place, places
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.config import layers as layers_lib
from hybrid_jax.config import model as model_lib

_MOE = "block_sparse_moe"
_DECAY_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
)
_INV_FREQ = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_VISION = re.compile(r"(vision_tower|multi_modal_projector)\..+|image_newline")
_LINEAR = re.compile(r".*\.(\w+_proj|output_gate|w[123])\.weight")


def is_decay_buffer(name: str) -> bool:
    """Tables of the decay that transformers stores for every lightning layer."""
    return _DECAY_BUFFER.fullmatch(name) is not None


def is_derived(name: str, num_layers: int, *, may_have_extra_layers: bool) -> bool:
    """Tensors that a checkpoint may hold and that are never loaded as weights.

    Decay tables and rotary frequencies follow from the config; layers past the last one are the
    multi-token-prediction modules that M2's config announces.
    """
    layer = _LAYER.match(name)
    if may_have_extra_layers and layer is not None and int(layer.group(1)) >= num_layers:
        return True
    return is_decay_buffer(name) or _INV_FREQ.fullmatch(name) is not None


def is_float32(name: str) -> bool:
    """Tensors that are never narrowed: routers, their biases, and the tables of the decay.

    The releases store the router in float32; in bfloat16 the tables lose every slow head's decay.
    """
    router = name.endswith((".gate.weight", ".e_score_correction_bias"))
    return router or is_decay_buffer(name) or _INV_FREQ.fullmatch(name) is not None


def is_vision(name: str) -> bool:
    """The tower, projector and row end of VL-01, beside its language model."""
    return _VISION.fullmatch(name) is not None


def is_linear(name: str) -> bool:
    """The matrices of layers but the router: what a release in FP8 quantises."""
    return _LINEAR.fullmatch(name) is not None


def rules(config: model_lib.ModelConfig, stored=(), prefix: str = "") -> list[Rule]:
    """One rule a published tensor; `stored` names decide which spelling of the experts is meant.

    `prefix` comes before every name, and is not in `stored`.

    ValueError if the config holds something the published family has no name for.
    """
    if config.shift_embeddings:
        raise ValueError("Published checkpoints have no shifted embeddings; save as orbax instead.")
    wide, words = config.hidden_dim, config.vocab_size
    found = [
        Rule("model.embed_tokens.weight", (words, wide), "embedding.table"),
        Rule("model.norm.weight", (wide,), "norm.scale"),
    ]
    if not config.tie_embeddings:
        found.append(Rule("lm_head.weight", (words, wide), "head.kernel", order=(1, 0)))
    for place in places(config):
        found += _layer_rules(place, wide, stored)
    if not prefix:
        return found
    return [dataclasses.replace(rule, name=prefix + rule.name) for rule in found]


def _layer_rules(place: Place, wide: int, stored) -> list[Rule]:
    name = f"model.layers.{place.layer_idx}"
    norms = [
        Rule(f"{name}.{published}.weight", (wide,), f"{place.prefix}.{ours}.scale", place.index)
        for published, ours in (
            ("input_layernorm", "mixer_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        )
    ]
    return norms + _mixer_rules(place, name, wide) + _ffn_rules(place, name, wide, stored)


def _mixer_rules(place: Place, name: str, wide: int) -> list[Rule]:
    table = {layers_lib.LightningAttention: _lightning, layers_lib.SoftmaxAttention: _softmax}
    mixer = place.layer.mixer
    return table[type(mixer)](mixer, f"{name}.self_attn", f"{place.prefix}.mixer", place, wide)


def _lightning(mixer, name, leaf, place, wide) -> list[Rule]:
    heads, size, index = mixer.num_heads, mixer.head_dim, place.index
    flat = heads * size
    return [
        # Rows are head-major: query, key and value of head 0, then those of head 1.
        Rule(
            f"{name}.qkv_proj.weight", (3 * flat, wide), f"{leaf}.qkv", index,
            (heads, 3, size, wide), (3, 0, 1, 2),
        ),
        Rule(
            f"{name}.output_gate.weight", (flat, wide), f"{leaf}.gate", index,
            (heads, size, wide), (2, 0, 1),
        ),
        Rule(f"{name}.norm.weight", (flat,), f"{leaf}.norm", index, (heads, size)),
        Rule(
            f"{name}.out_proj.weight", (wide, flat), f"{leaf}.out", index,
            (wide, heads, size), (1, 2, 0),
        ),
    ]  # fmt: skip


def _softmax(mixer, name, leaf, place, wide) -> list[Rule]:
    heads, groups, size, index = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, place.index
    found = [
        Rule(
            f"{name}.{part}_proj.weight", (count * size, wide), f"{leaf}.{part}", index,
            (count, size, wide), (2, 0, 1),
        )
        for part, count in (("q", heads), ("k", groups), ("v", groups))
    ]  # fmt: skip
    found.append(
        Rule(
            f"{name}.o_proj.weight", (wide, heads * size), f"{leaf}.out", index,
            (wide, heads, size), (1, 2, 0),
        )
    )  # fmt: skip
    if mixer.qk_norm:
        found += [
            Rule(
                f"{name}.{part}_norm.weight", (count * size,), f"{leaf}.{part}_norm", index,
                (count, size),
            )
            for part, count in (("q", heads), ("k", groups))
        ]  # fmt: skip
    return found


def _ffn_rules(place: Place, name: str, wide: int, stored) -> list[Rule]:
    ffn = place.layer.ffn
    if not isinstance(ffn, layers_lib.MoeFfn):
        raise ValueError(
            f"Layer {place.layer_idx} has a {type(ffn).__name__}; published checkpoints of the "
            "family name only mixtures of experts. Save as orbax instead."
        )
    # transformers' modules call the block `mlp`; no release does.
    block = "mlp" if f"{name}.mlp.gate.weight" in stored else _MOE
    leaf, index = f"{place.prefix}.ffn", place.index
    found = [
        Rule(
            f"{name}.{block}.gate.weight", (ffn.num_experts, wide), f"{leaf}.router", index,
            order=(1, 0),
        )
    ]  # fmt: skip
    if isinstance(ffn.router, layers_lib.SigmoidTopK):
        bias = f"{name}.{block}.e_score_correction_bias"
        found.append(Rule(bias, (ffn.num_experts,), f"{leaf}.correction_bias", index))
    fused = f"{name}.{block}.experts.gate_up_proj" in stored
    experts = f"{name}.{block}.experts"
    found += (_fused_experts if fused else _single_experts)(ffn, experts, leaf, index, wide)
    if ffn.shared is not None:
        found += _shared_expert(ffn.shared.hidden_dim, name, f"{leaf}.shared", index, wide)
    return found


def _single_experts(ffn, name, leaf, index, wide) -> list[Rule]:
    hidden, found = ffn.hidden_dim, []
    for e in range(ffn.num_experts):
        at = (*index, e)
        # w1 is the gate, w3 the up projection, w2 the way down.
        found += [
            Rule(
                f"{name}.{e}.{part}.weight", (hidden, wide), f"{leaf}.gate_up", place, order=(1, 0)
            )
            for part, place in (("w1", (*at, None, 0)), ("w3", (*at, None, 1)))
        ]
        found.append(
            Rule(f"{name}.{e}.w2.weight", (wide, hidden), f"{leaf}.down", at, order=(1, 0))
        )
    return found


def _fused_experts(ffn, name, leaf, index, wide) -> list[Rule]:
    count, hidden = ffn.num_experts, ffn.hidden_dim
    return [
        Rule(
            f"{name}.gate_up_proj", (count, 2 * hidden, wide), f"{leaf}.gate_up", index,
            (count, 2, hidden, wide), (0, 3, 1, 2),
        ),
        Rule(
            f"{name}.down_proj", (count, wide, hidden), f"{leaf}.down", index, order=(0, 2, 1)
        ),
    ]  # fmt: skip


def _shared_expert(hidden: int, name, leaf, index, wide) -> list[Rule]:
    """Names that the released code knows; no release holds them."""
    found = [
        Rule(
            f"{name}.shared_mlp.{part}_proj.weight", (hidden, wide), f"{leaf}.gate_up",
            (*index, None, which), order=(1, 0),
        )
        for part, which in (("gate", 0), ("up", 1))
    ]  # fmt: skip
    down = f"{name}.shared_mlp.down_proj.weight"
    found.append(Rule(down, (wide, hidden), f"{leaf}.down", index, order=(1, 0)))
    found.append(
        Rule(f"{name}.coefficient.weight", (1, wide), f"{leaf}.coefficient", index, (wide,))
    )
    return found
