"""Every byte of an export is held against its manifest, and every weight against its config."""

import json
import os
import re

import ml_dtypes
import numpy as np

from hybrid_jax import cli
from hybrid_jax.checkpoint import convert, digests, manifest, rereading
from tests.checkpoint import published

Q = "model.layers.2.self_attn.q_proj.weight"


def _directory(path, change=lambda tensors: None, shards: int = 2):
    config = published.original_config()
    tensors = published.tensors(config)
    change(tensors)
    return published.write_directory(path, config, tensors, shards)


def _flip(path, place: int = -3):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_without_a_manifest_checksums_are_not_known_and_one_can_be_made(tmp_path, capsys):
    directory = _directory(tmp_path / "d")
    assert cli.main(["verify", str(directory)]) == 1
    assert "checksums could not be" in (said := capsys.readouterr().out)
    assert "--write-manifest` makes one" in said
    assert not (directory / manifest.NAME).exists()
    assert cli.main(["verify", str(directory), "--write-manifest"]) == 0
    report = tmp_path / "r.json"
    assert cli.main(["verify", str(directory), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    stored = published.read_directory(directory)
    size = sum(file.stat().st_size for file in directory.iterdir() if file.name != manifest.NAME)
    assert (found["good"], found["manifest"], found["tensors"]) == (True, "holds", len(stored))
    # Each byte once.
    assert found["bytes"] == size
    assert cli.main(["verify", str(directory), "--write-manifest"]) == 2
    assert "has a manifest.json already" in capsys.readouterr().err


def test_the_manifest_made_here_is_that_of_whole_arrays_and_files(tmp_path):
    directory = _directory(tmp_path / "d")
    rereading.reread(directory, write_manifest=True)
    # The general reader of manifests agrees about the files ...
    known = manifest.verify(directory)
    assert set(known.files) == {
        "config.json",
        "model.safetensors.index.json",
        *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    # ... and the digest of arrays held in memory about the tensors.
    for name, (_, shape, raw) in published.read_directory(directory).items():
        array = np.frombuffer(raw, known.arrays[name].dtype).reshape(shape)
        digests.check_whole(name, known.arrays[name], array)


def test_a_flipped_bit_is_found_in_weights_headers_and_sidecars(tmp_path):
    directory = _directory(tmp_path / "d")
    (directory / "tokenizer.json").write_text('{"a": 1}')
    rereading.reread(directory, write_manifest=True)
    shard = directory / "model-00002-of-00002.safetensors"
    for path, place, said in (
        (shard, -3, r"model-00002-of-00002\.safetensors has other contents"),
        # A space of the header's padding: no tensor changes.
        (shard, 8 + int.from_bytes(shard.read_bytes()[:8], "little") - 1, "00002"),
        (directory / "tokenizer.json", 3, r"tokenizer\.json has other contents"),
    ):
        before = path.read_bytes()
        _flip(path, place)
        found = rereading.reread(directory)
        assert not found.is_good and any(re.search(said, each) for each in found.problems), said
        path.write_bytes(before)
    assert rereading.reread(directory).is_good
    _flip(shard)
    said = " ".join(rereading.reread(directory).problems)
    # The second of two shards has every second tensor.
    last = list(published.tensors(published.original_config()))[1::2][-1]
    assert f"The tensor '{last}' has other contents than its manifest says" in said


def test_what_is_not_finite_is_named_and_gets_no_manifest(tmp_path):
    def spoil(tensors):
        tensors[Q] = tensors[Q].copy()
        tensors[Q][3, 2] = np.nan
        tensors["model.norm.weight"] = np.full(12, np.inf, ml_dtypes.bfloat16)

    directory = _directory(tmp_path / "d", spoil)
    found = rereading.reread(directory, write_manifest=True)
    assert len(found.problems) == 2 and not found.is_good and found.manifest == "none"
    assert any(f"'{Q}' holds 1 values of 288 that are NaN" in each for each in found.problems)
    assert not (directory / manifest.NAME).exists()


def test_a_file_longer_than_a_piece_is_read_to_its_end(tmp_path, monkeypatch):
    # Pieces that divide neither files nor tensors, but values.
    monkeypatch.setattr(rereading, "_PIECE", 24)
    directory = _directory(tmp_path / "d", shards=1)
    rereading.reread(directory, write_manifest=True)
    monkeypatch.undo()
    assert rereading.reread(directory).is_good
    manifest.verify(directory)


def test_an_orbax_directory_is_held_against_its_own_checksums_too(tmp_path):
    convert(_directory(tmp_path / "d"), tmp_path / "o", "orbax")
    (tmp_path / "o" / manifest.NAME).unlink(missing_ok=True)
    assert rereading.reread(tmp_path / "o", write_manifest=True).is_good
    assert rereading.reread(tmp_path / "o").is_good
    data = max(
        (path for path in (tmp_path / "o" / "weights").rglob("*") if path.is_file()),
        key=os.path.getsize,
    )
    _flip(data, data.stat().st_size // 2)
    found = rereading.reread(tmp_path / "o")
    assert any(data.name in each and "other contents" in each for each in found.problems)


def test_what_is_wrong_by_its_headers_is_found_as_well(tmp_path, capsys):
    directory = _directory(tmp_path / "d")
    (directory / "model-00001-of-00002.safetensors").unlink()
    assert cli.main(["verify", str(directory)]) == 1
    assert "1 of 2 files that the index names are not here" in capsys.readouterr().out
    for arguments in (["--step", "3"], ["--tolerance", "0.1"]):
        assert cli.main(["verify", str(directory), *arguments]) == 2


def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, capsys):
    directory = _directory(tmp_path / "d")
    pipe, device = directory / "tokenizer.json", directory / "LICENSE"
    # With a manifest that says they are empty, and without one.
    pipe.touch()
    device.touch()
    manifest.write(directory)
    pipe.unlink()
    device.unlink()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    assert cli.main(["verify", str(directory)]) == 1
    out = capsys.readouterr().out
    for name in (pipe.name, device.name):
        assert re.search(rf"{name} cannot be read .*is a device or a pipe", out), out
    (directory / manifest.NAME).unlink()
    assert cli.main(["verify", str(directory), "--write-manifest"]) == 2
    assert "is a device or a pipe; expected a file" in capsys.readouterr().err


def test_a_file_elsewhere_is_not_read_through_a_link(tmp_path, capsys):
    directory = _directory(tmp_path / "d")
    shard = directory / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("/etc/passwd")
    found = rereading.reread(directory)
    assert [each for each in found.problems if str(shard) in each] == [
        f"{shard} is a link to /etc/passwd, outside the directory. Copy the file into {directory}."
    ]
    # Neither its length nor its first bytes are told.
    assert found.bytes == (directory / "model-00002-of-00002.safetensors").stat().st_size


def test_a_file_that_changes_while_it_is_read_gets_no_manifest(tmp_path):
    directory = _directory(tmp_path / "d", shards=1)
    weights = directory / "model.safetensors"
    found = rereading.reread(
        directory, write_manifest=True, progress=lambda count: os.utime(weights, ns=(0, 0))
    )
    assert any("has changed since it was opened" in each for each in found.problems)
    assert found.manifest == "none" and not (directory / manifest.NAME).exists()
