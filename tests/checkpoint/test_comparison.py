"""Two checkpoints are compared by what they fill in our tree, whatever holds it."""

import json

import ml_dtypes
import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import comparison, convert
from hybrid_jax.checkpoint.comparison import compare, count_differences
from tests.checkpoint import published
from tests.checkpoint.runs import parameters, run_directory

BF16 = ml_dtypes.bfloat16
W3 = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def _tensors(config=None):
    config = published.original_config() if config is None else config
    return config, published.tensors(config)


def test_the_same_in_orbax_and_in_other_shards_is_the_same(tmp_path):
    config, tensors = _tensors()
    source = published.write_directory(tmp_path / "a", config, tensors, 3)
    convert(source, tmp_path / "o", "orbax")
    # As many blocks as tensors: names tile the tree.
    found = compare(source, tmp_path / "o")
    assert (found.blocks, found.differences, found.notes) == (len(tensors), [], [])
    assert found.values == sum(array.size for array in tensors.values())
    assert compare(tmp_path / "o", source).values == found.values


def test_one_value_is_found_with_its_place_and_size(tmp_path, capsys):
    config, tensors = _tensors()
    first = published.write_directory(tmp_path / "a", config, tensors)
    changed = tensors | {W3: tensors[W3].copy()}
    changed[W3][4, 7] = BF16(2.0)
    was = float(tensors[W3][4, 7])
    second = published.write_directory(tmp_path / "b", config, changed, 2)
    (difference,) = compare(first, second).differences
    assert (difference.name, difference.what) == ("layers.1.ffn.gate_up[2, :, 1]", "values")
    assert (difference.here, difference.there) == (W3, W3)
    assert (difference.differing, difference.size) == (1, 120)
    assert difference.max_abs == pytest.approx(2.0 - was)
    assert difference.max_rel == pytest.approx((2.0 - was) / 2.0)
    report = tmp_path / "r.json"
    command = ["verify", str(first), "--against", str(second), "--json", str(report)]
    assert cli.main(command) == 1
    assert "layers.1.ffn.gate_up[2, :, 1]" in (said := capsys.readouterr().out)
    assert "1 of 120 values differ" in said and "1 blocks DIFFER" in said
    assert json.loads(report.read_text())["differences"][0]["differing"] == 1
    assert cli.main([*command, "--tolerance", "2"]) == 0
    assert "same within the tolerance" in capsys.readouterr().out


def test_fused_experts_are_the_same_as_single_ones(tmp_path):
    config = published.native_config()
    tensors = published.tensors(config, np.float32)
    fused = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = array
    for n in range(3):
        at = f"model.layers.{n}.block_sparse_moe.experts"
        w1, w2, w3 = (
            np.stack([tensors[f"{at}.{e}.{part}.weight"] for e in range(3)])
            for part in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{n}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{n}.mlp.experts.down_proj"] = w2
    single = published.write_directory(tmp_path / "a", config, tensors)
    other = published.write_directory(tmp_path / "b", config, fused)
    for here, there in ((single, other), (other, single)):
        found = compare(here, there)
        assert not found.differences and found.values == sum(a.size for a in tensors.values())
    fused["model.layers.1.mlp.experts.gate_up_proj"][2, 10 + 4, 7] += 1
    published.write_safetensors(other / "model.safetensors", fused)
    assert [each.name for each in compare(single, other).differences] == [
        "layers.1.ffn.gate_up[2, :, 1]"
    ]


def test_fp8_is_compared_by_its_values(tmp_path):
    config = published.m2_config(quantization_config=published.FP8_CONFIG)
    tensors = published.quantised(published.tensors(config))
    fp8 = published.write_directory(tmp_path / "fp8", config, tensors)
    convert(fp8, tmp_path / "bf16", "hf-original", "bfloat16")
    found = compare(fp8, tmp_path / "bf16", tolerance=0.004)
    # Products of FP8 and a float32 scale are rounded once, to 8 bits: 2 ** -9 at most.
    assert found.differences and not found.beyond
    assert max(each.max_rel for each in found.differences) <= 2**-8
    assert "F8_E4M3, BF16" in found.dtypes
    assert compare(fp8, tmp_path / "bf16").beyond


def test_a_run_is_compared_with_its_export(tmp_path):
    run, params = run_directory(tmp_path / "run", steps=(3,)), parameters()
    for format in ("hf-original", "orbax"):
        convert(run, tmp_path / format, format)
        for here, there in ((run, tmp_path / format), (tmp_path / format, run)):
            found = compare(here, there)
            assert not found.differences, found.differences[:2]
            assert found.values == sum(array.size for array in params.values())
    assert not compare(tmp_path / "orbax", tmp_path / "hf-original").differences


def test_other_layers_and_experts_are_missing_or_of_another_shape(tmp_path):
    first = published.write_directory(tmp_path / "a", *_tensors())
    config, tensors = _tensors(published.original_config("llss", num_local_experts=2))
    second = published.write_directory(tmp_path / "b", config, tensors)
    there = {each.name: each.what for each in compare(first, second).differences}
    assert there["layers.3.mixer.q"] == "missing here"
    assert there["layers.0.ffn.down[2]"] == "missing there"
    assert there["layers.0.ffn.router"] == "shape"
    back = {each.name: each.what for each in compare(second, first).differences}
    turned = {"missing here": "missing there", "missing there": "missing here"}
    assert back.keys() == there.keys()
    assert all(turned.get(what, what) == back[name] for name, what in there.items())


def test_differences_are_counted_by_value():
    a = np.array([[1.0, -0.0, np.nan], [np.inf, 2.0, 3.0]], np.float32)
    b = np.array([[1.0, 0.0, np.nan], [np.inf, 2.5, 3.0]], np.float32)
    assert count_differences(a, a.copy(), 0.0) == (0, 0, 0.0, 0.0)
    assert count_differences(a, b, 0.0) == (1, 1, 0.5, 0.2)
    assert count_differences(a.T, b.T, 0.2) == (1, 0, 0.5, 0.2)
    # What is not finite is infinitely far from all else.
    c = np.array([[np.inf, 0.0, 1.0], [-np.inf, 2.0, np.nan]], np.float32)
    assert count_differences(a, c, 1e9) == (4, 4, np.inf, np.inf)
    assert count_differences(a, a.astype(BF16), 0.0)[0] == 0


def test_large_arrays_are_widened_in_pieces(monkeypatch):
    monkeypatch.setattr(comparison, "_CHUNK", 7)
    draw = np.random.default_rng(0)
    a = draw.standard_normal((3, 5, 4))
    b = a.copy()
    b[2, 3, 1] += 0.25
    b[0, 0, 0] += 0.5
    assert count_differences(a, b, 0.0)[:3] == (2, 2, pytest.approx(0.5))


def test_what_makes_no_sense_is_refused(tmp_path):
    directory = published.write_directory(tmp_path / "a", *_tensors())
    with pytest.raises(ValueError, match="tolerance must be"):
        compare(directory, directory, tolerance=float("nan"))
    with pytest.raises(ValueError, match="x does not exist"):
        compare(directory, tmp_path / "x")
    assert cli.main(["verify", str(directory), "--against", str(directory), "--step", "1"]) == 2
