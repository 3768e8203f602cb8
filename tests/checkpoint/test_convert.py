"""Conversion keeps every byte both ways, uses every tensor once, and fails without a trace."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import convert, opened
from hybrid_jax.checkpoint.formats.orbax import OrbaxDirectory
from tests.checkpoint import published
from tests.checkpoint.published import FP8_CONFIG, m2_config, native_config, original_config

BF16 = np.dtype(ml_dtypes.bfloat16)


def _native(dtype=np.float32):
    config = native_config()
    return config, published.tensors(config, dtype) | published.decay_buffers(config)


def _m2_fp8():
    config = m2_config(quantization_config=FP8_CONFIG)
    tensors = published.quantised(published.tensors(config))
    # What M2 announces and never published: layers past the last one.
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.ones((3, 2), BF16)
    return config, tensors


def _original(**changes):
    config = original_config(**changes)
    tensors = published.tensors(config)
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.ones((2,), np.float32)
    return config, tensors


SOURCES = {
    "original": (_original, 1, "hf-original"),
    "original, shared expert": (lambda: _original(shared_intermediate_size=5), 3, "hf-original"),
    "native": (_native, 1, "hf"),
    "native, bfloat16, sharded": (lambda: _native(BF16), 4, "hf"),
    "m2": (lambda: (m2_config(), published.tensors(m2_config())), 1, "hf-original"),
    "m2, fp8, sharded": (_m2_fp8, 2, "hf-original"),
    "m2 as hf": (_m2_fp8, 1, "hf"),
}  # fmt: skip


@pytest.mark.parametrize("make, shards, format", SOURCES.values(), ids=SOURCES)
def test_there_and_back_through_orbax_is_bit_identical(tmp_path, make, shards, format):
    config, tensors = make()
    source = published.write_directory(tmp_path / "src", config, tensors, shards)
    summary = convert(source, tmp_path / "orbax", "orbax")
    assert (summary.tensors, summary.bytes) == (
        len(tensors),
        sum(array.nbytes for array in tensors.values()),
    )
    # Nothing of the source may be needed any more.
    source.rename(tmp_path / "gone")
    convert(tmp_path / "orbax", tmp_path / "back", format)
    assert published.read_directory(tmp_path / "back") == published.stored(tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_between_the_published_formats_only_config_and_decay_tables_change(tmp_path):
    config, tensors = _native()
    plain = {name: array for name, array in tensors.items() if "_decay" not in name}
    plain = {name: array for name, array in plain.items() if "slope_rate" not in name}
    source = published.write_directory(tmp_path / "native", config, tensors)
    convert(source, tmp_path / "original", "hf-original", shard_bytes=2000)
    assert published.read_directory(tmp_path / "original") == published.stored(plain)
    assert len(list((tmp_path / "original").glob("model-*-of-*.safetensors"))) > 1
    values = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (values["attn_type_list"], values["rotary_dim"], values["eos_token_id"]) == (
        [0, 0, 1],
        6,
        2,
    )
    convert(tmp_path / "original", tmp_path / "again", "hf")
    again = published.read_directory(tmp_path / "again")
    assert again.keys() == published.stored(tensors).keys()
    assert {name: again[name] for name in plain} == published.stored(plain)


def test_fp8_is_multiplied_with_its_scales_if_a_dtype_is_given(tmp_path):
    config, tensors = _m2_fp8()
    source = published.write_directory(tmp_path / "src", config, tensors, shards=2)
    convert(source, tmp_path / "bf16", "hf-original", "bfloat16")
    found = published.read_directory(tmp_path / "bf16")
    assert not [name for name in found if name.endswith("_scale_inv")]
    kept = [name for name in tensors if not name.endswith("_scale_inv")]
    assert set(found) == set(kept)
    for name in kept:
        expected = tensors[name]
        if f"{name}_scale_inv" in tensors:
            expected = published.dequantised(tensors, name).astype(BF16)
        assert found[name] == published.stored({name: expected})[name], name
    values = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in values and values["torch_dtype"] == "bfloat16"


def test_a_dtype_never_narrows_routers_and_decay_tables(tmp_path):
    config, tensors = _native()
    source = published.write_directory(tmp_path / "src", config, tensors)
    convert(source, tmp_path / "orbax", "orbax", "bfloat16")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    for name, (tag, _, _) in published.read_directory(tmp_path / "hf").items():
        kept = name.endswith(("moe.gate.weight", "slope_rate", "_decay"))
        assert tag == ("F32" if kept else "BF16"), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_fused_experts_stay_fused_in_hf_and_are_taken_apart_in_the_released_names(
    tmp_path, monkeypatch
):
    config = native_config()
    tensors = published.tensors(config, np.float32)
    fused = {}
    for name, array in tensors.items():
        if "block_sparse_moe" not in name:
            fused[name] = array
    for layer in range(3):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        fused[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        one = lambda e, part, old=old: tensors[f"{old}.experts.{e}.{part}.weight"]
        both = [np.concatenate([one(e, "w1"), one(e, "w3")]) for e in range(3)]
        fused[f"{new}.experts.gate_up_proj"] = np.stack(both)
        fused[f"{new}.experts.down_proj"] = np.stack([one(e, "w2") for e in range(3)])
    source = published.write_directory(tmp_path / "src", config, fused)
    convert(source, tmp_path / "orbax", "orbax")
    sources = []
    opened_one = lambda path: sources.append(OrbaxDirectory(path)) or sources[-1]
    monkeypatch.setattr(opened.orbax, "OrbaxDirectory", opened_one)
    # Each file gets a matrix or two, and all experts are read once.
    convert(tmp_path / "orbax", tmp_path / "original", "hf-original", shard_bytes=1000)
    assert published.read_directory(tmp_path / "original") == published.stored(tensors)
    (orbax,) = sources
    assert orbax.bytes_read == sum(info.nbytes for info in orbax.tensors.values())
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    found = published.read_directory(tmp_path / "hf")
    assert {name: found[name] for name in fused} == published.stored(fused)


def test_tokenizer_and_company_travel_along(tmp_path):
    config, tensors = _native()
    source = published.write_directory(tmp_path / "src", config, tensors, shards=2)
    company = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "generation_config.json": '{"top_p": 0.95}',
        "chat_template.jinja": "{{ messages }}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "LICENSE": "free",
        "modeling_minimax_m1.py": "pass",
    }
    for name, text in company.items():
        (source / name).write_text(text)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (source / ".cache").mkdir()
    convert(source, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", "hf")
    for directory in ("orbax", "hf"):
        for name, text in company.items():
            assert (tmp_path / directory / name).read_text() == text
        assert not (tmp_path / directory / "pytorch_model.bin").exists()
        assert not (tmp_path / directory / ".cache").exists()


def test_company_does_not_follow_links_out_of_the_directory(tmp_path):
    config, tensors = _original()
    source = published.write_directory(tmp_path / "src", config, tensors)
    (tmp_path / "secret").write_text("mine")
    (source / "additional_chat_templates").symlink_to(".")
    (source / "chat_template.jinja").write_text("x")
    convert(source, tmp_path / "dst", "hf")
    assert os.listdir(tmp_path / "dst" / "additional_chat_templates") == ["chat_template.jinja"]
    for name, target, message in (
        ("vocab.txt", "../secret", "vocab.txt is a link to .*secret, outside the directory"),
        ("tokenizer.json", "absent", "tokenizer.json is a link that leads to no file"),
        ("tokenizer.json", "tokenizer.json", "tokenizer.json is a link that leads to no file"),
    ):
        (source / name).symlink_to(target)
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "other", "hf")
        (source / name).unlink()
    assert sorted(os.listdir(tmp_path)) == ["dst", "secret", "src"]


Q = "model.layers.2.self_attn.q_proj.weight"


def _renamed(tensors):
    tensors["model.layers.2.self_attn.q_prj.weight"] = tensors.pop(Q)


def _with(name, array):
    return lambda tensors: tensors.update({name: array})


def _bad_value(tensors):
    tensors[Q] = tensors[Q].copy()
    tensors[Q][3, 2] = np.nan


SCALE = "model.layers.0.self_attn.q_proj.weight_scale_inv"
DAMAGE = {
    "missing": (_original, lambda t: t.pop(Q), f"lacks 1 tensors.*'{Q}'"),
    "misspelt": (_original, _renamed, f"'{Q}'. Did you mean 'model.layers.2.self_attn.q_prj."),
    "extra": (_original, _with("model.layers.9.x", np.ones(2, BF16)), "'model.layers.9.x', which"),
    "extra bias": (_original, _with(f"{Q[:-6]}bias", np.ones(2, BF16)), "q_proj.bias', which the"),
    "wrong shape": (_original, _with(Q, np.ones((12, 24), BF16)), f"'{Q}' has shape .12, 24.;"),
    "whole numbers": (_original, _with(Q, np.ones((24, 12), np.int32)), f"'{Q}' is stored as I32"),
    "NaN": (_original, _bad_value, f"'{Q}' holds 1 values of 288 that are NaN"),
    "infinite": (_native, _with(Q, np.full((24, 12), np.inf, np.float32)), "288 values of 288"),
    "fp8, no scale": (_m2_fp8, lambda t: t.pop(SCALE), f"lacks 1 tensors.*'{SCALE}'"),
    "scale, no fp8": (_m2_fp8, _with(SCALE[:-10], np.ones((24, 12), BF16)), f"'{SCALE}', which"),
    "scale shape": (_m2_fp8, _with(SCALE, np.ones((3, 2), np.float32)), "expected F32.3, 3."),
    "NaN scale": (_m2_fp8, _with(SCALE, np.full((3, 3), np.nan, np.float32)), f"'{SCALE}' holds 9"),
}  # fmt: skip


@pytest.mark.parametrize("make, damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_tensor_is_named_and_nothing_is_left_behind(tmp_path, make, damage, message):
    config, tensors = make()
    damage(tensors)
    source = published.write_directory(tmp_path / "src", config, tensors)
    for format in ("orbax", "hf", "hf-original"):
        with pytest.raises(ValueError, match=message) as caught:
            convert(source, tmp_path / "dst", format)
        assert str(source) in str(caught.value)
        assert os.listdir(tmp_path) == ["src"]


def test_fp8_without_a_quantization_config_is_refused(tmp_path):
    _, tensors = _m2_fp8()
    source = published.write_directory(tmp_path / "src", m2_config(), tensors)
    with pytest.raises(ValueError, match=r"config.json has no quantization_config"):
        convert(source, tmp_path / "dst", "orbax")
    int8 = m2_config(quantization_config={"quant_method": "int8"})
    (source / "config.json").write_text(json.dumps(int8))
    with pytest.raises(ValueError, match=r"quant_method 'int8'; readable is 'fp8'"):
        convert(source, tmp_path / "dst", "orbax")


def test_weights_that_are_not_finite_pass_if_asked_for(tmp_path):
    config, tensors = _original()
    _bad_value(tensors)
    source = published.write_directory(tmp_path / "src", config, tensors)
    convert(source, tmp_path / "dst", "hf-original", check_finite=False)
    assert published.read_directory(tmp_path / "dst") == published.stored(tensors)


def test_a_flipped_bit_in_orbax_is_found_and_named(tmp_path):
    # Small arrays lie compressed in Orbax's index; a larger one has its bytes in a file.
    config, tensors = _original(vocab_size=4096)
    source = published.write_directory(tmp_path / "src", config, tensors)
    convert(source, tmp_path / "orbax", "orbax")
    embedding = tensors["model.embed_tokens.weight"].tobytes()
    files = [path for path in (tmp_path / "orbax" / "weights").rglob("*") if path.is_file()]
    data = next(path for path in files if embedding in path.read_bytes())
    raw = bytearray(data.read_bytes())
    raw[raw.find(embedding) + 40] ^= 1
    data.write_bytes(raw)
    # TensorStore's own checksum or ours, as its version has it; never silence.
    with pytest.raises(ValueError, match="weights/00000"):
        convert(tmp_path / "orbax", tmp_path / "dst", "hf")
    assert sorted(os.listdir(tmp_path)) == ["orbax", "src"]


def test_a_damaged_orbax_directory_is_refused_by_name(tmp_path):
    config, tensors = _original()
    convert(published.write_directory(tmp_path / "src", config, tensors), tmp_path / "o", "orbax")
    index = tmp_path / "o" / "hybrid_jax.json"
    good = index.read_text()
    for bad, message in (
        ("{", "hybrid_jax.json is not JSON"),
        ("{}", "not an index of"),
        (good.replace('"version": 2', '"version": 1'), "is of version 1; this release reads 2"),
        (good.replace('"published"', '"x"'), "`vocabulary`"),
        (good.replace('"F32"', '"F31"'), "needs dtype"),
        (good.replace('"F32"', '["F32"]'), "needs dtype"),
        (good.replace('"digest"', '"digst"'), "has bad digests"),
        (good.replace('"parts": [', '"parts": [], "x": ['), "has bad digests, not of all"),
        (good.replace('"group": 0', '"group": 7'), "weights/00007, which is missing"),
    ):
        assert bad != good
        index.write_text(bad)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "o", tmp_path / "dst", "hf")


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_a_tensor_without_dims_survives_orbax_and_one_without_values_is_refused(tmp_path, shape):
    config, extra = m2_config(), "model.layers.2.x"
    tensors = published.tensors(config) | {extra: np.ones((1, *shape), np.float32)[0]}
    source = published.write_directory(tmp_path / "src", config, tensors)
    convert_to = lambda src, dst, format: convert(tmp_path / src, tmp_path / dst, format)
    if 0 in shape:
        with pytest.raises(ValueError, match=rf"'{extra}' of shape \[0, 3\] has no values"):
            convert_to("src", "dst", "orbax")
        assert os.listdir(tmp_path) == ["src"]
        return
    convert_to("src", "dst", "orbax")
    convert_to("dst", "back", "hf-original")
    assert published.read_directory(tmp_path / "back") == published.read_directory(source)
    assert published.read_directory(source)[extra][1] == ()


FULL_DISK = """
import resource, sys
from hybrid_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
for format in ("orbax", "hf", "hf-original"):
    print(cli.main(["convert", sys.argv[1], sys.argv[2], "--format", format]))
"""


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    config = original_config(vocab_size=4096)
    source = published.write_directory(tmp_path / "src", config, published.tensors(config))
    command = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.split() == ["2", "2", "2"], result.stderr
    # Orbax may add noise from its event loop, even within a line.
    for part in ("error: ", "File too large", ".dst.draft/content/"):
        assert result.stderr.count(part) >= 3, result.stderr
    assert os.listdir(tmp_path) == ["src"]


def test_a_destination_that_cannot_be_made_is_an_error(tmp_path):
    config, tensors = _original()
    source = published.write_directory(tmp_path / "src", config, tensors)
    (tmp_path / "file").write_text("")
    # Root may write everywhere, but nobody below a file.
    with pytest.raises(OSError, match="file must be a directory"):
        convert(source, tmp_path / "file" / "dst", "hf")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="it is a file or a link"):
        convert(source, tmp_path / "loop", "hf")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "src"]


def test_a_failure_takes_the_directories_above_along(tmp_path):
    config, tensors = _original()
    _bad_value(tensors)
    source = published.write_directory(tmp_path / "src", config, tensors)
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match=r"NaN or infinite.*`hybrid-jax convert --allow-nonfinite"):
        convert(source, tmp_path / "deep" / "a" / "b", "hf")
    assert not os.listdir(tmp_path / "deep")


def test_the_command_reports_and_exits_as_promised(tmp_path, capsys):
    config, tensors = _original()
    source = published.write_directory(tmp_path / "src", config, tensors)
    report = tmp_path / "report.json"
    command = ["convert", str(source), str(tmp_path / "dst"), "--format", "orbax"]
    assert cli.main([*command, "--json", str(report)]) == 0
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    assert json.loads(report.read_text())["tensors"] == len(tensors)
    assert cli.main(command) == 0
    assert "is this conversion already" in capsys.readouterr().err
    assert cli.main([*command[:-1], "hf"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (source / "model.safetensors").write_bytes(b"\x80\x02.")
    assert cli.main(["convert", str(source), str(tmp_path / "x"), "--format", "hf"]) == 2
    assert "pickle" in capsys.readouterr().err
    assert not pathlib.Path(tmp_path / "x").exists()
