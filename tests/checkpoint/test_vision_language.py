"""The language part of VL-01 comes back under its own names, and other models go there."""

import dataclasses
import json
import os

import numpy as np
import pytest

import hybrid_jax
from hybrid_jax import cli
from hybrid_jax.checkpoint import convert, hf_config, rehearsal
from tests.checkpoint import published, releases

PREFIX = "language_model."
VL = "hf-vl-01"


def _prefixed(tensors):
    return {PREFIX + name: array for name, array in tensors.items()}


def _text(**changes):
    config = published.original_config(model_type="minimax_text_01", **changes)
    tensors = published.tensors(config)
    # No weight, and of no format: it keeps travelling, under the name that is asked for.
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.ones((2,), np.float32)
    return config, tensors


def test_the_language_part_comes_back_with_its_names_bytes_and_config(tmp_path):
    text, tensors = _text()
    language = _prefixed(tensors)
    vision = {"image_newline": tensors["model.norm.weight"]}
    config = releases.vl_01_config(text)
    source = published.write_directory(tmp_path / "vl", config, language | vision, shards=2)
    with pytest.warns(UserWarning, match="vision part"):
        convert(source, tmp_path / "orbax", "orbax", language_only=True)
        convert(source, tmp_path / "direct", VL, language_only=True)
    convert(tmp_path / "orbax", tmp_path / "back", VL)
    for made in (tmp_path / "direct", tmp_path / "back"):
        assert published.read_directory(made) == published.stored(language)
        assert (made / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.warns(UserWarning, match="vision part"):
        assert cli.main(["verify", str(source), "--against", str(tmp_path / "back")]) == 0
    # Of another dtype it is the same file but for that, in both places that may tell.
    convert(tmp_path / "back", tmp_path / "wide", VL, "float32")
    values = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert values["text_config"].pop("torch_dtype") == "float32"
    assert values.pop("torch_dtype") == "float32"
    assert values == config


def test_text_01_becomes_the_language_part_and_text_01_again(tmp_path, capsys):
    text, tensors = _text(shared_intermediate_size=5)
    source = published.write_directory(tmp_path / "text", text, tensors)
    dry = ["convert", str(source), "--format", VL, "--dry-run"]
    assert cli.main(dry) == 0
    vl = tmp_path / "vl"
    convert(source, vl, VL, shard_bytes=4000)
    assert published.read_directory(vl) == published.stored(_prefixed(tensors))
    values = json.loads((vl / "config.json").read_text())
    assert values["model_type"] == "minimax_vl_01"
    assert values["architectures"] == ["MiniMaxVL01ForConditionalGeneration"]
    inner = values["text_config"]
    assert (inner["model_type"], inner["eos_token_id"]) == ("minimax_text_01", 7)
    assert cli.main(["verify", str(vl)]) == 0
    assert cli.main(["verify", str(source), "--against", str(vl)]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(vl)]) == 0
    assert "minimax_vl_01: 3 layers" in capsys.readouterr().out
    convert(vl, tmp_path / "again", "hf-original")
    assert published.read_directory(tmp_path / "again") == published.stored(tensors)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert hf_config.describe(again, "").model == hf_config.describe(text, "").model
    # Saved by a model, only what is no weight is gone.
    hybrid_jax.save(hybrid_jax.load(vl), tmp_path / "saved", VL)
    saved = published.read_directory(tmp_path / "saved")
    weights = {name: array for name, array in tensors.items() if "inv_freq" not in name}
    assert saved.keys() == published.stored(_prefixed(weights)).keys()
    assert cli.main(["verify", str(vl), "--against", str(tmp_path / "saved")]) == 0


def test_decay_tables_and_fp8_scales_lose_and_get_the_prefix_with_their_weights(tmp_path):
    native = published.native_config()
    tensors = published.tensors(native)
    tables = published.decay_buffers(native)
    source = published.write_directory(tmp_path / "hf", native, tensors | tables)
    convert(source, tmp_path / "vl", VL)
    assert published.read_directory(tmp_path / "vl") == published.stored(_prefixed(tensors))
    # transformers would write its tables behind the prefix too: read, and told from weights.
    config = releases.vl_01_config(published.original_config())
    whole = published.write_directory(tmp_path / "tables", config, _prefixed(tensors | tables))
    convert(whole, tmp_path / "bare", VL)
    assert published.read_directory(tmp_path / "bare") == published.stored(_prefixed(tensors))
    convert(whole, tmp_path / "again", "hf")
    assert published.read_directory(tmp_path / "again") == published.stored(tensors | tables)
    convert(tmp_path / "vl", tmp_path / "vl-fp8", VL, "fp8")
    convert(tmp_path / "vl", tmp_path / "fp8", "hf-original", "fp8")
    blocks = published.read_directory(tmp_path / "fp8")
    assert published.read_directory(tmp_path / "vl-fp8") == _prefixed(blocks)
    # Blocks as they are, whichever way the prefix goes.
    for here, there, format in (("vl-fp8", "back", "hf-original"), ("fp8", "vl-back", VL)):
        convert(tmp_path / here, tmp_path / there, format)
        found = published.read_directory(tmp_path / there)
        assert found == (blocks if format != VL else _prefixed(blocks))


def test_what_vl_01_cannot_be_is_refused_and_leaves_nothing(tmp_path):
    config = published.m2_config()
    source = published.write_directory(tmp_path / "m2", config, published.tensors(config))
    said = "VL-01 has no field for sigmoid routing or query-key norms. Save M2 as hf-original"
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "vl", VL)
    assert said in rehearsal.rehearse(source, VL).problems[0]
    model = hybrid_jax.load(source, dtype="bfloat16")
    with pytest.raises(ValueError, match=said):
        hybrid_jax.save(model, tmp_path / "vl", VL)
    described = hf_config.describe(published.original_config(), "")
    with pytest.raises(ValueError, match="shifted embeddings"):
        hf_config.write(dataclasses.replace(described.model, shift_embeddings=True), VL, "float32")
    assert os.listdir(tmp_path) == ["m2"]


def test_a_config_that_no_release_had_says_of_which_dtype_it_is():
    described = hf_config.describe(published.original_config(), "")
    values = hf_config.write(described.model, VL, "bfloat16", described)
    assert (values["torch_dtype"], values["text_config"]["torch_dtype"]) == ("bfloat16",) * 2
    assert hf_config.describe(values, "").model == described.model
