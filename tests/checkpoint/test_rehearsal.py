"""A dry run needs config.json and an index, maps every name, and refuses what would not fit."""

import json
import re

import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import convert, hf_config, rehearsal
from hybrid_jax.checkpoint.opened import open_checkpoint
from tests.checkpoint import published, releases

RELEASES = {
    "text-01": (releases.text_01_config, releases.text_01),
    "m2": (releases.m2_config, releases.m2),
    "vl-01": (releases.vl_01_config, releases.vl_01),
}


@pytest.fixture(scope="module")
def lists():
    return {name: (config(), tensors()) for name, (config, tensors) in RELEASES.items()}


@pytest.mark.parametrize(
    "name, format, written, size, dropped",
    [
        # Four tables in each of 70 layers: 64 * (1 + 256 + 256 + 256 * 256) float32.
        ("text-01", "hf", 8243 + 280, 912_210_767_872 + 70 * 4 * 64 * (1 + 512 + 65536), 0),
        ("m2", "orbax", 96_103, 230_121_630_720, 0),
        ("vl-01", "hf-original", 8243, 912_210_767_872, 394),
    ],
)
def test_the_releases_have_a_place_for_every_tensor(
    lists, tmp_path, name, format, written, size, dropped
):
    config, tensors = lists[name]
    directory = releases.write_index(tmp_path / name, config, tensors)
    found = rehearsal.rehearse(directory, format, language_only=True)
    assert found.problems == []
    assert (found.written, found.bytes, len(found.dropped)) == (written, size, dropped)
    assert sum(row.count for row in found.rows) == len(tensors)
    # Shapes come from the config here, and from the tables of the release there.
    for row in found.rows:
        if row.count == 1 and row.shape is not None:
            assert row.shape == tensors[row.name][1]


Q = "model.layers.15.self_attn.q_proj.weight"
W = "model.layers.79.block_sparse_moe.experts.31.w2.weight"
WRONG = {
    "one too many": (lambda t: t | {"model.layers.3.bias": ("BF16", (1,))}, r"model\.layers\.3\.b"),
    "one too few": (lambda t: {n: f for n, f in t.items() if n != W}, rf"1 tensors .*missing: {W}"),
    "misspelt": (
        lambda t: {n.replace("15.self_attn.q_proj", "15.self_attn.q_prj"): f for n, f in t.items()},
        rf"missing: {Q}\. Did you mean 'model\.layers\.15\.self_attn\.q_prj\.weight'",
    ),
    "a layer too many": (
        lambda t: t | {n.replace(".79.", ".80."): f for n, f in t.items() if ".79." in n},
        r"103 tensors have no place .*model\.layers\.80\.input_layernorm\.weight",
    ),
    "an expert too many": (
        lambda t: t | {W.replace(".31.", ".32."): ("BF16", (6144, 9216))},
        r"experts\.32\.w2\.weight",
    ),
    "a layer of another kind": (
        lambda t: {n.replace("layers.14.self_attn.out_", "layers.14.self_attn.o_"): f
                   for n, f in t.items()},
        r"missing: model\.layers\.14\.self_attn\.out_proj\.weight\. Did you mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_has_no_place_is_refused_by_name(lists, tmp_path, change, message):
    config, tensors = lists["text-01"]
    directory = releases.write_index(tmp_path / "d", config, change(tensors))
    said = " ".join(rehearsal.rehearse(directory, "hf-original").problems)
    assert re.search(message, said), said


def test_a_scale_of_m2_that_is_missing_or_too_many_is_refused(lists, tmp_path):
    config, tensors = lists["m2"]
    scale = "model.layers.61.block_sparse_moe.experts.255.w1.weight_scale_inv"
    norm = "model.norm.weight_scale_inv"
    changed = {n: f for n, f in tensors.items() if n != scale} | {norm: ("F32", (1, 1))}
    directory = releases.write_index(tmp_path / "d", config, changed)
    missing, unknown = rehearsal.rehearse(directory, "orbax").problems
    assert f"1 tensors are missing: {scale}" in missing
    # A norm is never in FP8.
    assert f"1 tensors have no place in the model: {norm}" in unknown


def test_the_command_prints_the_mapping_and_writes_nothing(tmp_path, capsys):
    config = published.original_config()
    directory = published.write_directory(tmp_path / "d", config, published.tensors(config), 2)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    report = tmp_path / "r.json"
    command = ["convert", str(directory), "--format", "orbax", "--dry-run"]
    assert cli.main([*command, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.{0..1}.self_attn.qkv_proj.weight" in out
    assert "-> stack.runs.0.mixer.qkv[0, 0..1], split to [4, 3, 6, 12], dims in order" in out
    assert cli.main([*command, "--full"]) == 0
    said = capsys.readouterr().out
    line = next(each for each in said.splitlines() if "1.block_sparse_moe.experts.2.w3" in each)
    assert line.endswith("-> stack.runs.0.ffn.gate_up[0, 1, 2, :, 1], dims in order [1, 0]")
    assert len(json.loads(report.read_text())["rows"]) < len(published.shapes(config))
    (directory / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert "experts.3" in captured.err and "would not be converted" in captured.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["d", "r.json"]
    # Without --dry-run there has to be a place.
    assert cli.main(command[:-1]) == 2


def test_a_vision_language_model_is_converted_without_its_vision_part(tmp_path):
    text = published.original_config(model_type="minimax_text_01")
    tensors = published.tensors(text)
    whole = {f"language_model.{name}": array for name, array in tensors.items()}
    whole["image_newline"] = whole["multi_modal_projector.linear_1.bias"] = tensors[
        "model.norm.weight"
    ]
    config = releases.vl_01_config(text)
    source = published.write_directory(tmp_path / "vl", config, whole, shards=2)
    with (
        pytest.warns(UserWarning, match="2 tensors of its vision part, first"),
        pytest.raises(ValueError, match=r"2 tensors of a vision part.*--language-only"),
    ):
        convert(source, tmp_path / "x", "orbax")
    with pytest.warns(UserWarning, match="vision part"):
        convert(source, tmp_path / "orbax", "orbax", language_only=True)
    # What is left of it is opened as what it is, with nothing to warn of.
    with open_checkpoint(tmp_path / "orbax") as checkpoint:
        assert checkpoint.description.prefix == "language_model." and not checkpoint.vision
    convert(tmp_path / "orbax", tmp_path / "text", "hf-original")
    assert published.read_directory(tmp_path / "text") == published.stored(tensors)
    values = json.loads((tmp_path / "text" / "config.json").read_text())
    assert values["model_type"] == "minimax_text_01" and "text_config" not in values
    described = hf_config.describe(values, "config.json")
    assert described.model == hf_config.describe(text, "config.json").model


def test_a_vision_language_config_without_its_language_is_refused():
    for inner in (None, [], {"model_type": "minimax_vl_01"}):
        with pytest.raises(ValueError, match=r"c\.json: 'text_config' must be the config of a lan"):
            hf_config.describe({"model_type": "minimax_vl_01", "text_config": inner}, "c.json")
    with pytest.raises(ValueError, match=r"c\.json: text_config lacks the required field"):
        hf_config.describe({"model_type": "minimax_vl_01", "text_config": {}}, "c.json")
