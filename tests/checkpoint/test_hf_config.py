"""config.json in three dialects gives the model it describes, and whatever is wrong is named."""

import dataclasses
import json

import pytest

from hybrid_jax.checkpoint import hf_config
from hybrid_jax.checkpoint.formats.files import LocalFolder
from hybrid_jax.config import layers, model, presets
from tests.checkpoint.published import (
    FP8_CONFIG,
    D,
    E,
    F,
    G,
    H,
    K,
    W,
    m2_config,
    native_config,
    original_config,
)

WHERE = "dir/config.json"
DIALECTS = {"original": original_config, "native": native_config, "m2": m2_config}


def read(values: dict) -> model.ModelConfig:
    return hf_config.describe(values, WHERE).model


def test_the_released_dialect_is_read_field_by_field():
    config = read(original_config("lls"))
    linear, full = config.layers[0], config.layers[2]
    assert config.num_layers == 3 and config.layers[1] == linear
    assert linear.mixer == layers.LightningAttention(num_heads=H, head_dim=K, norm_eps=1e-6)
    assert full.mixer == layers.SoftmaxAttention(
        num_heads=H, num_kv_heads=G, head_dim=K, rotary_dim=4, rope_theta=1e7, qk_norm=False
    )
    router = layers.SoftmaxTopK(experts_per_token=2)
    assert linear.ffn == layers.MoeFfn(num_experts=E, hidden_dim=F, router=router)
    assert linear.residual == layers.Residual(
        source="normed", mixer_alpha=1.6, mixer_beta=1.1, ffn_alpha=1.4, ffn_beta=0.8
    )
    assert full.residual == dataclasses.replace(linear.residual, mixer_alpha=1.3, mixer_beta=0.9)
    assert (config.vocab_size, config.hidden_dim, config.norm_eps) == (W, D, 1e-5)
    assert (config.tie_embeddings, config.max_positions) == (False, 4096)


def test_without_postnorm_the_residual_is_the_raw_input():
    config = read(original_config(postnorm=False))
    assert {layer.residual.source for layer in config.layers} == {"input"}


def test_a_shared_expert_is_read():
    for width in (5, [5]):
        config = read(original_config(shared_intermediate_size=width))
        assert config.layers[0].ffn.shared == layers.SharedExpert(hidden_dim=5)


def test_the_native_dialect_rotates_the_whole_head_unless_the_file_says_less():
    theta = {"rope_theta": 10000.0, "rope_type": "default"}
    half = {"rope_parameters": theta | {"partial_rotary_factor": 2 / 3}}
    top = {"rope_parameters": None, "rope_theta": 10000, "partial_rotary_factor": 2 / 3}
    for changes, rotary_dim in (({}, K), ({"rotary_dim": 4}, 4), (half, 4), (top, 4)):
        mixer = read(native_config(**changes)).layers[2].mixer
        assert (mixer.rotary_dim, mixer.rope_theta) == (rotary_dim, 10000.0), changes


def test_leftovers_of_a_converted_config_must_agree():
    leftovers = {"attn_type_list": [0, 0, 1], "shared_intermediate_size": [0]}
    assert read(native_config(**leftovers)) == read(native_config())
    with pytest.raises(ValueError, match="'attn_type_list' must be absent or the same"):
        read(native_config(attn_type_list=[1, 0, 0]))


def test_m2_is_read_in_both_spellings():
    released = read(m2_config())
    spelled = {"rope_theta": 5000000.0, "rope_type": "default", "partial_rotary_factor": 4 / 6}
    native = m2_config(
        attn_type_list=..., rope_theta=..., rope_parameters=spelled, use_qk_norm=..., use_mtp=...
    )
    assert read(native) == released
    layer = released.layers[0]
    assert layer.mixer.qk_norm and layer.mixer.rotary_dim == 4
    assert layer.ffn.router == layers.SigmoidTopK(experts_per_token=2)
    assert layer.residual == layers.Residual(source="input")
    first_upload = m2_config(model_type="minimax")
    assert read(first_upload).layers == released.layers


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("format", ["hf", "hf-original"])
def test_every_preset_comes_back_from_both_formats(name, format):
    config = presets.get(name)
    if any(isinstance(layer.ffn, layers.DenseFfn) for layer in config.layers):
        with pytest.raises(ValueError, match=r"no field for a dense feed-forward.*orbax"):
            hf_config.write(config, format, "bfloat16")
        return
    values = hf_config.write(config, format, "bfloat16")
    again = read(json.loads(json.dumps(values)))
    # Names, precision and how a program is compiled are no part of a published config.
    own = {
        "name": config.name,
        "dtypes": config.dtypes,
        "remat": config.remat,
        "scan_layers": config.scan_layers,
    }
    assert dataclasses.replace(again, **own) == config


def test_a_config_in_the_wanted_dialect_stays_as_it_is_and_others_keep_the_token_ids():
    source = hf_config.describe(original_config(eos_token_id=7), WHERE)
    assert hf_config.write(source.model, "hf-original", "bfloat16", source) == source.json
    native = hf_config.write(source.model, "hf", "bfloat16", source)
    assert (native["model_type"], native["eos_token_id"], native["dtype"]) == (
        "minimax",
        7,
        "bfloat16",
    )
    assert dataclasses.replace(read(native), name="minimax_m1") == source.model
    assert "auto_map" not in native and native["rotary_dim"] == 4


def test_what_a_dialect_cannot_say_is_an_error_with_a_way_out():
    original = read(original_config())
    for changes, format, message in (
        ({"shift_embeddings": True}, "hf-original", "shifted embeddings"),
        ({"pattern": read(original_config(postnorm=False)).pattern}, "hf", "not normalised"),
        ({"pattern": read(original_config(shared_intermediate_size=5)).pattern}, "hf", "shared"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*orbax instead"):
            hf_config.write(dataclasses.replace(original, **changes), format, "float32")
    mixed = original.pattern + read(original_config(layernorm_mlp_beta=0.5)).pattern
    with pytest.raises(ValueError, match="one residual for lightning layers"):
        hf_config.write(dataclasses.replace(original, pattern=mixed), "hf", "float32")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "field",
    [
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "vocab_size"),
        "rms_norm_eps",
    ],
)
def test_a_missing_field_is_named(dialect, field):
    with pytest.raises(ValueError, match=rf"{WHERE} lacks the required field '{field}'"):
        read(DIALECTS[dialect](**{field: ...}))


@pytest.mark.parametrize(
    "values, field",
    [(original_config, f) for f in ("postnorm", "attn_type_list", "layernorm_mlp_alpha")]
    + [(original_config, "layernorm_linear_attention_beta"), (original_config, "rope_theta")]
    + [(native_config, f) for f in ("layer_types", "mlp_beta_factor", "full_attn_alpha_factor")],
)
def test_fields_with_a_default_elsewhere_are_required_here(values, field):
    with pytest.raises(ValueError, match=f"lacks the required field '{field}'"):
        read(values(**{field: ...}))


BAD = {
    "typo": (native_config, {"mlp_beta_facto": 1.0}, "field 'mlp_beta_facto'.*mean 'mlp_beta"),
    "unknown": (original_config, {"layer_skip": 2}, "unknown field 'layer_skip'"),
    "inner unknown": (
        native_config,
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "twist": 1}},
        "rope_parameters: unknown field 'twist'",
    ),
    "negative": (original_config, {"hidden_size": -12}, "'hidden_size' must be a positive"),
    "zero": (m2_config, {"num_local_experts": 0}, "'num_local_experts' must be a positive"),
    "endless layers": (
        m2_config,
        {"num_hidden_layers": 10**12, "attn_type_list": ...},
        "'num_hidden_layers' must be at most",
    ),
    "endless experts": (m2_config, {"num_local_experts": 10**12}, "'num_local_experts' must be at"),
    "experts of all layers": (
        m2_config,
        {"num_hidden_layers": 20, "attn_type_list": [1] * 20, "num_local_experts": 9999},
        "'num_local_experts' must be at most 100000 in all layers together; got 199980",
    ),
    "beyond floats": (original_config, {"rms_norm_eps": 10**400}, "must be a finite number"),
    "rotary list": (original_config, {"rotary_dim": []}, "'rotary_dim' must be a whole number"),
    "rotary share": (native_config, {"partial_rotary_factor": 1e308}, "a number from 0 to 1"),
    "block text": (original_config, {"block_size": "x"}, "'block_size' must be a positive whole"),
    "block wide": (original_config, {"block_size": 10**6}, "'block_size' must be at most 4096"),
    "endless text": (original_config, {"hidden_act": "x" * 10**6}, "got 'x{199}\\.$"),
    "fraction": (native_config, {"vocab_size": 32.5}, "'vocab_size' must be a positive whole"),
    "bool": (native_config, {"num_attention_heads": True}, "'num_attention_heads' must be"),
    "text": (original_config, {"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a finite number"),
    "nan": (original_config, {"layernorm_mlp_alpha": float("nan")}, "finite number; got nan"),
    "negative eps": (original_config, {"rms_norm_eps": -1e-5}, "norm_eps must be >= 0"),
    "heads": (original_config, {"num_key_value_heads": 3}, "num_heads=4 must be a multiple of"),
    "width": (
        native_config,
        {"head_dim": ..., "num_attention_heads": 5},
        "'num_attention_heads' must be a divisor of hidden_size=12",
    ),
    "rotary odd": (original_config, {"rotary_dim": 3}, "rotary_dim=3 must be even"),
    "rotary wide": (original_config, {"rotary_dim": 8}, "at most head_dim=6"),
    "too many": (m2_config, {"num_experts_per_tok": 9}, "cannot exceed"),
    "list short": (original_config, {"attn_type_list": [0, 1]}, "a list of 3 items.*got 2"),
    "list values": (original_config, {"attn_type_list": [0, 1, 2]}, "out of .0, 1.; got 2"),
    "list bools": (original_config, {"attn_type_list": [False, False, True]}, "got False"),
    "list no list": (native_config, {"layer_types": "full"}, "'layer_types' must be a"),
    "postnorm": (original_config, {"postnorm": 1}, "'postnorm' must be true or false"),
    "raw native": (native_config, {"postnorm": False}, "'postnorm' must be True"),
    "dtype": (native_config, {"dtype": "float99"}, "'dtype' must be .*; got 'float99'"),
    "dtype list": (original_config, {"torch_dtype": [3]}, r"'torch_dtype' must be .*; got \[3\]"),
    "gelu": (native_config, {"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
    "window": (native_config, {"sliding_window": 128}, "'sliding_window' must be None"),
    "yarn": (
        native_config,
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}},
        "'rope_parameters' must be absent or of rope_type 'default'",
    ),
    "old yarn": (original_config, {"rope_scaling": {"type": "yarn"}}, "'rope_scaling'"),
    "two thetas": (native_config, {"rope_theta": 1e6}, "given twice, with different"),
    "softmax scores": (m2_config, {"scoring_func": "softmax"}, "'scoring_func' must be 'sigmoid'"),
    "per head": (m2_config, {"qk_norm_type": "per_head"}, "'qk_norm_type' must be 'per_layer'"),
    "no bias": (m2_config, {"use_routing_bias": False}, "'use_routing_bias' must be True"),
    "lightning m2": (m2_config, {"attn_type_list": [0, 1]}, "items out of .1.; got 0"),
    "model type": (original_config, {"model_type": "minimax_m3"}, "model_type is 'minimax_m3'"),
    "no model type": (original_config, {"model_type": ...}, "model_type is None"),
}  # fmt: skip


@pytest.mark.parametrize("dialect, changes, message", BAD.values(), ids=BAD)
def test_a_wrong_value_is_named_with_its_file(dialect, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(dialect(**changes))
    assert WHERE in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "[" * 20000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json"):
        hf_config.read_from(LocalFolder(tmp_path), "config.json")


def test_a_config_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a readable file: Is a directory"):
        hf_config.read_from(LocalFolder(tmp_path.parent), tmp_path.name)


def test_harmless_fields_are_accepted():
    harmless = {
        "torch_dtype": "bfloat16",
        "_name_or_path": "x",
        "auto_map": {},
        "pad_token_id": 0,
        "quantization_config": FP8_CONFIG,
    }
    for dialect in DIALECTS.values():
        assert read(dialect(**harmless)).layers == read(dialect()).layers
