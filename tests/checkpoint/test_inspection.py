"""What a directory holds is told from headers alone; what is wrong with it is told, not raised."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import convert, digests, inspection, manifest
from hybrid_jax.checkpoint.names import folding
from hybrid_jax.checkpoint.opened import open_checkpoint
from tests.checkpoint import published, releases
from tests.checkpoint.runs import run_directory

TEXT_01 = ("minimax-text-01", "minimax-m1-40k", "minimax-m1-80k")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The releases at their true size, with holes for weights."""
    place = tmp_path_factory.mktemp("releases")
    releases.write_sparse(place / "text-01", releases.text_01_config(), releases.text_01())
    releases.write_sparse(place / "m2", releases.m2_config(), releases.m2())
    releases.write_sparse(place / "vl-01", releases.vl_01_config(), releases.vl_01())
    return place


def test_the_lists_of_the_releases_have_the_published_totals():
    # Counts and bytes from the index of M1; M2's numbers as its repository shows them.
    text_01, m2 = releases.text_01(), releases.m2()
    assert (len(text_01), releases.num_bytes(text_01)) == (8243, 912_210_767_872)
    assert (len(m2), releases.numbers(m2)) == (96_103, 228_703_644_928)


@pytest.mark.parametrize(
    "name, count, parameters, names",
    [
        ("text-01", 8243, (456_089_655_296, 48_403_306_496), TEXT_01),
        ("m2", 96_103, (228_689_764_864, 11_030_553_088), ("minimax-m2", "minimax-m2.1")),
        ("vl-01", 8243 + 394, (456_089_655_296, 48_403_306_496), TEXT_01),
    ],
)
def test_a_release_of_true_size_is_whole(large, name, count, parameters, names):
    begin = time.perf_counter()
    found = inspection.inspect(large / name)
    # 1.5 and 4 s with a busy machine; what grows with the square of the names takes minutes.
    assert time.perf_counter() - begin < 60
    assert found.problems == [] and len(found.listing.tensors) == count
    # minimax.md 1.1 and 2.3: totals, and what a token meets, head and embedding included.
    assert found.parameters == parameters
    assert found.closest.names[: len(names)] == names
    assert len(found.match.vision) == (394 if name == "vl-01" else 0)


def test_a_release_of_true_size_is_opened_and_read(large):
    for name, norm in (("text-01", "model.norm.weight"), ("m2", "model.norm.weight")):
        with open_checkpoint(large / name) as checkpoint:
            read = dict(checkpoint.read([norm], dequantize=True))
            assert not read[norm].any() and read[norm].shape == (checkpoint.config.hidden_dim,)


def test_a_preset_can_be_asked_for(large):
    found = inspection.inspect(large / "text-01", preset="minimax-m2")
    assert "hidden_dim: 6144, not 3072" in found.closest.differences
    assert any("no place in the model" in problem for problem in found.problems)
    with pytest.raises(ValueError, match=r"no preset 'minimax-m3'"):
        inspection.inspect(large / "text-01", preset="minimax-m3")


def test_names_are_folded_and_numbers_are_spelt():
    grid = [f"l.{n}.e.{e}.w" for n, e in itertools.product(range(3), (1, 3, 5))]
    assert [f.pattern for f in folding.fold(["x", *grid])] == ["x", "l.{0..2}.e.{1,3..5}.w"]
    assert folding.fold(grid[1:])[0].pattern == "l.{0..2}.e.{1,3..5}.w (8 of 9)"
    assert folding.spans(n for n in range(32) if n % 8 != 7) == "0..6,8..14,16..22,24..30"
    assert folding.spans(n for n in range(80) if n % 8 != 7) == "0..6,8..14,…,72..78"
    # What lies apart by its kind is not folded together; what looks like a number is none.
    assert len(folding.fold(["a.0", "a.1", "a.2"], lambda name: name == "a.1")) == 2
    assert folding.fold(["a.0", "a.²"])[1].pattern == "a.²"


Q = "model.layers.2.self_attn.q_proj.weight"


def _tiny(path, shards: int = 3, **changes):
    config = published.original_config(**changes)
    return published.write_directory(path, config, published.tensors(config), shards)


def _rewrite(path, change):
    path.write_text(change(path.read_text()))


def _shard(directory, number: int = 2):
    return directory / f"model-0000{number}-of-00003.safetensors"


def _cut(directory):
    raw = _shard(directory).read_bytes()
    _shard(directory).write_bytes(raw[:-2])


def _misspell(directory):
    for file in directory.glob("*.safetensors"):
        raw = file.read_bytes()
        # As long as the right name: the header keeps its length.
        file.write_bytes(raw.replace(b"layers.2.self_attn.q_proj", b"layers.2.self_attn.q_porj"))
    index = directory / "model.safetensors.index.json"
    _rewrite(index, lambda t: t.replace("layers.2.self_attn.q_proj", "layers.2.self_attn.q_porj"))


DAMAGE = {
    "no shard": (lambda d: _shard(d).unlink(), "1 of 3 files .* are not here, first model-00002"),
    "cut": (_cut, r"model-00002-of-00003\.safetensors is truncated"),
    "pickle": (lambda d: _shard(d).write_bytes(b"\x80\x02x"), "is a PyTorch pickle"),
    "misspelt": (_misspell, rf"1 tensors are missing: {Q}\. Did you mean .*q_porj"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "unknown field": (
        lambda d: _rewrite(d / "config.json", lambda t: t.replace('"postnorm"', '"prenorm"')),
        "'postnorm'",
    ),
    "another width": (
        lambda d: _rewrite(d / "config.json", lambda t: t.replace('_size": 12', '_size": 18')),
        r"'model\.embed_tokens\.weight' has shape \[32, 12\]; the config asks for \[32, 18\]",
    ),
    "bad index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        r"index\.json must be JSON.*",
    ),
    "no index": (
        lambda d: (d / "model.safetensors.index.json").unlink(),
        r"3 safetensors files but no model\.safetensors\.index\.json",
    ),
    "index tells lies": (
        lambda d: _rewrite(d / "model.safetensors.index.json", lambda t: t.replace(Q, Q + "x")),
        rf"holds '{Q}' \(1 such",
    ),
    "a shard too many": (lambda d: (d / "x.safetensors").touch(), r"first x\.safetensors"),
    "int8": (
        lambda d: _rewrite(
            d / "config.json", lambda t: t[:-1] + ', "quantization_config": {"quant_method": "x"}}'
        ),
        "quant_method 'x'",
    ),
    "a name too long": (
        lambda d: _rewrite(
            d / "model.safetensors.index.json",
            lambda t: t.replace("model-00002", "x" * 300),
        ),
        "1 of 3 files .* are not here, first x",
    ),
    "endless manifest": (
        lambda d: ((d / "manifest.json").touch(), os.truncate(d / "manifest.json", 20 << 30)),
        "manifest.json is 21474836480 bytes long; expected a small file",
    ),
    "link": (
        lambda d: (_shard(d).unlink(), _shard(d).symlink_to("/etc/hostname")),
        "is a link to /etc/hostname, outside",
    ),
}


@pytest.mark.parametrize("harm, message", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_told(tmp_path, harm, message, capsys):
    directory = _tiny(tmp_path / "d")
    assert inspection.inspect(directory).problems == []
    harm(directory)
    said = inspection.inspect(directory).problems
    assert any(re.search(message, problem) for problem in said), said
    assert cli.main(["inspect", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: " in out and "NOT a whole checkpoint" in out


def test_names_that_are_no_text_can_be_printed(tmp_path):
    directory = _tiny(pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")))
    index = directory / "model.safetensors.index.json"
    _rewrite(index, lambda t: t.replace(f'"{Q}"', r'"\ud800x"'))
    command = [sys.executable, "-m", "hybrid_jax.cli", "inspect", str(directory)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert r"\udcff: Hugging Face" in found.stdout and r"\ud800x  " in found.stdout


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    for path, message in ((tmp_path, "is no checkpoint"), (tmp_path / "x", "does not exist")):
        assert cli.main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    directory = _tiny(tmp_path / "d")
    (directory / "tokenizer.json").write_text("{}")
    report, picture = tmp_path / "report.json", tmp_path / "sizes.png"
    command = ["inspect", str(directory), "--json", str(report), "--plot", str(picture)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "3 layers (2 lightning, 1 softmax)" in out and "model.layers.{0..1}.self_attn.qkv" in out
    said = json.loads(report.read_text())
    stored = published.read_directory(directory)
    assert sum(row["count"] for row in said["tensors"]) == len(stored)
    assert sum(row["bytes"] for row in said["tensors"]) == sum(len(b) for *_, b in stored.values())
    assert (said["dialect"], said["sidecars"], said["problems"]) == (
        "minimax_m1",
        ["tokenizer.json"],
        [],
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(directory), "--plot", str(tmp_path / "no" / "x.png")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_orbax_and_its_damage_are_told(tmp_path):
    convert(_tiny(tmp_path / "d"), tmp_path / "o", "orbax")
    found = inspection.inspect(tmp_path / "o")
    assert found.problems == [] and (found.listing.container, found.listing.vocabulary) == (
        "Orbax",
        "published",
    )
    group = tmp_path / "o" / "weights" / "00000"
    group.rename(tmp_path / "gone")
    assert any(
        "00000, which is missing" in each for each in inspection.inspect(tmp_path / "o").problems
    )
    (tmp_path / "o" / "hybrid_jax.json").unlink()
    assert any("hybrid_jax.json" in each for each in inspection.inspect(tmp_path / "o").problems)


def test_a_run_is_told_by_its_newest_good_step(tmp_path):
    run = run_directory(tmp_path / "run")
    found = inspection.inspect(run)
    assert found.problems == [] and found.listing.step == 10
    assert found.closest.names == ("nano",) and found.closest.differences == ()
    assert inspection.inspect(run, step=9).listing.step == 9
    data = next((run / "checkpoints" / "10").rglob("d/*"))
    data.write_bytes(data.read_bytes()[1:])
    found = inspection.inspect(run)
    assert found.listing.step == 9 and len(found.problems) == 1
    assert "Step 10 is not what was written" in found.problems[0]


def test_a_manifest_that_does_not_fit_is_told(tmp_path):
    directory = _tiny(tmp_path / "d")
    held = {Q: digests.Held((24, 12), "float32", {(0, 0): np.ones((24, 12), np.float32)})}
    manifest.write(directory, digests.describe(held))
    found = inspection.inspect(directory)
    assert found.checksums == "written as 'd': 5 files, 1 arrays"
    assert [p for p in found.problems if f"{Q} is bfloat16[24, 12], not float32[24, 12]" in p]
