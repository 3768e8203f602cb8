"""Directories made by transformers are read, and transformers reads ours and computes the same."""

import json

import numpy as np
import pytest

import hybrid_jax
from hybrid_jax import cli
from hybrid_jax.checkpoint import convert
from tests.checkpoint import published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["linear_attention", "linear_attention", "full_attention"]


def _minimax(**changes):
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        num_hidden_layers=3, layer_types=KINDS, full_attn_alpha_factor=1.5, **(SIZES | changes)
    )
    return transformers.MiniMaxForCausalLM(config)


def _m2(**changes):
    torch.manual_seed(0)
    config = transformers.MiniMaxM2Config(num_hidden_layers=2, rotary_dim=4, **(SIZES | changes))
    model = transformers.MiniMaxM2ForCausalLM(config)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_()
    return model


def _logits(model, tokens_BT) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_BT)).logits.float().numpy()


TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))


@pytest.mark.parametrize("make", [_minimax, _m2])
def test_a_saved_model_goes_there_and_back_and_into_ours(tmp_path, make):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    stored = published.read_directory(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    convert(tmp_path / "theirs", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    assert published.read_directory(tmp_path / "back") == stored
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    ours = hybrid_jax.load(tmp_path / "orbax")
    # float32 on both sides, sums in another order: 1e-5 of the largest logit.
    expected = _logits(theirs, TOKENS)
    np.testing.assert_allclose(ours(TOKENS), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["hf", "hf-original"])
def test_transformers_loads_what_we_save_as_m2(tmp_path, format):
    theirs = _m2()
    theirs.save_pretrained(tmp_path / "theirs")
    hybrid_jax.save(hybrid_jax.load(tmp_path / "theirs"), tmp_path / "ours", format=format)
    again = _loaded(tmp_path / "ours")
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rope, expected_rope = again.config.rope_parameters, theirs.config.rope_parameters
    assert rope["partial_rotary_factor"] == 0.5
    assert rope["rope_theta"] == expected_rope["rope_theta"]


def test_transformers_computes_what_we_save_as_hf(tmp_path):
    # For 6 heads transformers would choose other slopes; our tables tell it the released ones.
    _minimax(num_attention_heads=6).save_pretrained(tmp_path / "theirs")
    model = hybrid_jax.load(tmp_path / "theirs")
    hybrid_jax.save(model, tmp_path / "ours", format="hf")
    expected = _logits(_loaded(tmp_path / "ours"), TOKENS)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-5 * np.abs(expected).max())


def _loaded(path, reader=transformers.AutoModelForCausalLM, missing=frozenset(), **kwargs):
    model, report = reader.from_pretrained(
        path, dtype="float32", output_loading_info=True, **kwargs
    )
    assert report.pop("missing_keys") == missing
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize(
    "format, mapping", [("hf-original", None), ("hf-vl-01", {r"^language_model\.": ""})]
)
def test_transformers_reads_released_names_with_a_config_of_its_own(tmp_path, format, mapping):
    _minimax().save_pretrained(tmp_path / "theirs")
    model = hybrid_jax.load(tmp_path / "theirs")
    hybrid_jax.save(model, tmp_path / "ours", format)
    # It has no class for these two model types, which come with code of theirs.
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        _loaded(tmp_path / "ours")
    # No release holds tables of the decay; it computes them.
    kinds = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    missing = {f"model.layers.{n}.self_attn.{kind}" for n in range(2) for kind in kinds}
    config = transformers.MiniMaxConfig.from_pretrained(tmp_path / "theirs")
    reader = transformers.MiniMaxForCausalLM
    again = _loaded(tmp_path / "ours", reader, missing, config=config, key_mapping=mapping)
    expected = _logits(again, TOKENS)
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["hf", "hf-original"])
def test_transformers_computes_what_we_export_in_fp8(tmp_path, format, monkeypatch):
    # Its blocks must divide each weight.
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 128}
    _m2(**sizes, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", format, "fp8")
    # It asks for accelerate, which deals models out to devices, wherever it reads FP8.
    quantizer = transformers.quantizers.quantizer_finegrained_fp8
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    # Without a GPU for products in FP8, it multiplies with the scales as it loads.
    widened = transformers.FineGrainedFP8Config(dequantize=True)
    expected = _logits(_loaded(tmp_path / "ours", quantization_config=widened), TOKENS)
    model = hybrid_jax.load(tmp_path / "ours")
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-5 * np.abs(expected).max())


def test_the_decay_tables_are_those_that_transformers_saves(tmp_path):
    _minimax(block_size=32).save_pretrained(tmp_path / "theirs")
    theirs = published.read_directory(tmp_path / "theirs")
    # As released there are no tables, so `hf` has to compute them.
    convert(tmp_path / "theirs", tmp_path / "original", "hf-original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps(config | {"block_size": 32}))
    convert(tmp_path / "original", tmp_path / "ours", "hf")
    ours = published.read_directory(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    tables = [name for name in ours if name.endswith(("slope_rate", "_decay"))]
    assert len(tables) == 8
    for name in ours:
        assert ours[name][:2] == theirs[name][:2]
        if name not in tables:
            assert ours[name][2] == theirs[name][2]
            continue
        a, b = (np.frombuffer(side[name][2], np.float32) for side in (ours, theirs))
        # Two libraries' exp: a few units in the last place of the exponent's argument.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-30)


def test_bfloat16_weights_of_transformers_keep_their_bytes(tmp_path):
    _minimax().to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    assert (
        cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "o"), "--format", "orbax"])
        == 0
    )
    assert cli.main(["convert", str(tmp_path / "o"), str(tmp_path / "back"), "--format", "hf"]) == 0
    back, stored = (published.read_directory(tmp_path / name) for name in ("back", "theirs"))
    assert back == stored and {tag for tag, _, _ in stored.values()} == {"BF16"}
