"""Sharded models become the files that an unsharded one becomes, each process writing its part."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_jax
from hybrid_jax.checkpoint import convert, digests, draft, leaves, manifest, pieces
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.names.rules import Rule
from tests.checkpoint import killed, published
from tests.checkpoint.models import LARGE, SHARD_BYTES, model_of, placed
from tests.sharding import together


def _weights(directory) -> dict[str, bytes]:
    names = ("*.safetensors", "*.index.json", "config.json", "tokenizer.json")
    return {path.name: path.read_bytes() for name in names for path in directory.glob(name)}


@pytest.fixture(scope="module")
def model():
    return model_of(**LARGE)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """What one process writes of a model on one device."""
    out = tmp_path_factory.mktemp("alone")
    company = out / "company"
    company.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (company / name).write_text("{}")
    for format in ("hf-original", "hf", "orbax"):
        hybrid_jax.save(model, out / format, format, sidecars=company, shard_bytes=SHARD_BYTES)
    narrow = {"dtype": "bfloat16", "sidecars": company, "shard_bytes": SHARD_BYTES}
    hybrid_jax.save(model, out / "bfloat16", **narrow)
    hybrid_jax.save(model_of(), out / "fp8", dtype="fp8")
    return out


def test_a_model_on_eight_devices_becomes_the_same_files(model, alone, tmp_path):
    split = placed(model, jax.devices())
    hybrid_jax.save(
        split, tmp_path / "hf", "hf", sidecars=alone / "company", shard_bytes=SHARD_BYTES
    )
    assert _weights(tmp_path / "hf") == _weights(alone / "hf")
    one, other = manifest.verify(tmp_path / "hf"), manifest.verify(alone / "hf")
    assert (one.files, one.arrays) == (other.files, other.arrays)


def _recorded(draft, process: int) -> int:
    """Bytes of tensors that a process has recorded in a draft."""
    bodies = [
        json.loads(path.read_text())
        for path in (draft / "units").glob("*.json")
        if int(path.stem) % 2 == process
    ]
    arrays = [digests.from_json(body["arrays"]) for body in bodies]
    parts = [part for each in arrays for array in each.values() for part in array.shards]
    return sum(4 * math.prod(part.shape) for part in parts)


def _end_early(alone, out) -> None:
    """A start in which the second process has no space at first, and is killed later."""
    arguments = ("-m", "tests.checkpoint.saved", out, alone / "company", "early")
    started = together.start(2, 4, arguments, out / "logs")
    try:
        assert started[1].wait(300) == -signal.SIGKILL, together.lines(out / "logs", 1)
        assert started[0].poll() is None, "it ended without the other one"
    finally:
        # The first one waits for the other, a minute until that counts as dead.
        for process in started:
            process.kill()
            process.wait()
    for process in range(2):
        said = [line for line in together.lines(out / "logs", process) if line.startswith("{")]
        assert "No space left on device" in json.loads(said[0])["error"], said
    assert sorted(os.listdir(out)) == [".hf.draft", ".orbax.draft", "logs"]


def test_two_processes_write_half_each_and_go_on_after_a_kill(alone, tmp_path):
    _end_early(alone, tmp_path)
    kept = {
        "hf-original": (0, 0),
        "hf": [_recorded(tmp_path / ".hf.draft", process) for process in range(2)],
        # A group counts when both have finished it. One of the first one's alone is no use.
        "orbax": 2 * [_recorded(tmp_path / ".orbax.draft", 1)],
    }
    # Four of twenty files, and the larger one of two groups.
    assert kept["hf"][1] > 3_000_000 and kept["orbax"][1] > 10_000_000
    arguments = ("-m", "tests.checkpoint.saved", tmp_path, alone / "company")
    started = together.start(2, 4, arguments, tmp_path / "logs")
    codes = together.wait(started, 300)
    logs = [together.lines(tmp_path / "logs", process) for process in range(2)]
    assert codes == [0, 0], logs
    total = sum(len(data) for data in _weights(alone / "hf").values())
    for process in range(2):
        *said, there, split = (json.loads(line) for line in logs[process] if line[0] == "{")
        for report in said:
            written = report["written"] + kept[report["format"]][process]
            assert 0.4 < written / total < 0.6, (report, kept, total)
        assert "exists and is not empty" in there["error"]
        assert "No process holds all of" in split["error"]
    for name in ("bfloat16", "fp8"):
        assert _weights(tmp_path / name) == _weights(alone / name)
    for format in ("hf-original", "hf"):
        assert _weights(tmp_path / format) == _weights(alone / format)
        found = manifest.verify(tmp_path / format)
        assert found.files == manifest.read(alone / format).files
        for name, (tag, shape, data) in published.read_directory(tmp_path / format).items():
            array = np.frombuffer(data, np.float32).reshape(shape)
            assert tag == "F32"
            digests.check_whole(name, found.arrays[name], array)
            assert sum(np.prod(part.shape) for part in found.arrays[name].shards) == array.size
    manifest.verify(tmp_path / "orbax")
    one, other = (leaves.arrays(hybrid_jax.load(d / "orbax")) for d in (tmp_path, alone))
    for name in one:
        assert np.array_equal(one[name], other[name]), name
    names = ["bfloat16", "fp8", "hf", "hf-original", "logs", "orbax"]
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.nightly
@pytest.mark.parametrize("format", ["hf-original", "orbax"])
def test_killed_at_20_random_moments_it_goes_on_and_the_result_is_identical(tmp_path, format):
    found = killed.run("save", tmp_path, format, 20, 1)
    whole, names = tmp_path / "whole", set()
    for number, trial in enumerate(found["trials"]):
        print(trial)
        assert trial["first"] == {"killed": True}
        dst = tmp_path / f"trial-{number}"
        names.add(dst.name)
        if trial["was_there"]:
            assert "exists and is not empty" in trial["second"]["error"]
        elif trial["units"]:
            # What was finished is not written again.
            assert trial["second"]["said"][0].startswith(f"{trial['units']} of ")
            assert trial["second"]["bytes"] < found["whole"]["bytes"]
        again = manifest.verify(dst)
        assert again.arrays == manifest.read(whole).arrays
        if format == "hf-original":
            # Orbax gives its files random names.
            assert _weights(dst) == _weights(whole) and again.files == manifest.read(whole).files
    assert set(os.listdir(tmp_path)) == {"whole", *names}
    assert any(trial["units"] for trial in found["trials"])


def test_what_another_model_left_is_never_taken_for_this_ones(tmp_path, monkeypatch):
    one, other = model_of(1), model_of(2)
    said: list[str] = []
    for name, model in (("one", one), ("other", other)):
        hybrid_jax.save(model, tmp_path / name, shard_bytes=4000)
    dst = tmp_path / "dst"

    def start(model, stops_at=None):
        """Until the disk is full as a unit is to be recorded: its file is there."""
        real = draft.Draft.record

        def record(self, number, written):
            if number == stops_at:
                raise OSError(28, "No space left on device")
            real(self, number, written)

        with monkeypatch.context() as patch:
            patch.setattr(draft.Draft, "record", record)
            hybrid_jax.save(model, dst, shard_bytes=4000, note=said.append)

    for model, stops_at in ((one, 3), (other, 0)):
        with pytest.raises(OSError, match="No space left"):
            start(model, stops_at)
        assert said.pop().startswith(f"{3 - (model is other)} units of {dst} are finished")
    start(one)
    # The first one is the other model's by now, and the record of it had gone before.
    assert said.pop().startswith("2 of 10 units were finished already")
    assert _weights(dst) == _weights(tmp_path / "one")
    with pytest.raises(ValueError, match="exists and is not empty"):
        start(one)
    dst.rename(tmp_path / "first")
    with pytest.raises(OSError, match="No space left"):
        start(one, 3)
    with pytest.raises(ValueError, match=r"not the same config and layout.*rm -r .*draft"):
        hybrid_jax.save(one, dst, "hf-original", "fp8", shard_bytes=4000)
    start(other)
    assert not said[1:] and _weights(dst) == _weights(tmp_path / "other")
    manifest.verify(dst)
    assert sorted(os.listdir(tmp_path)) == ["dst", "first", "one", "other"]


@pytest.mark.parametrize("format", ["hf-original", "hf", "hf-vl-01"])
def test_blocks_are_those_of_a_conversion(tmp_path, format):
    hybrid_jax.save(model_of(), tmp_path / "wide", format, "bfloat16")
    model = hybrid_jax.load(tmp_path / "wide", dtype="bfloat16")
    hybrid_jax.save(model, tmp_path / "saved", format, "fp8")
    convert(tmp_path / "wide", tmp_path / "converted", format, "fp8")
    saved, converted = (published.read_directory(tmp_path / n) for n in ("saved", "converted"))
    assert saved == converted
    assert {tag for tag, _, _ in saved.values()} == {"F8_E4M3", "BF16", "F32"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    one, again = (leaves.arrays(hybrid_jax.load(tmp_path / n)) for n in ("saved", "converted"))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    # Some number has changed, so blocks were made and are not merely said to be there.
    assert any(not np.array_equal(array, leaves.arrays(model)[name]) for name, array in one.items())


def test_blocks_have_no_names_in_orbax(tmp_path):
    with pytest.raises(ValueError, match="Scales have names in published vocabularies only"):
        hybrid_jax.save(model_of(), tmp_path / "saved", "orbax", "fp8")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, fp8; got 'int4'"):
        hybrid_jax.save(model_of(), tmp_path / "saved", "hf", "int4")
    assert not os.listdir(tmp_path)


@st.composite
def _boxes(draw):
    """A shape whose dims are fused from others in another order, and a box of these."""
    group = st.lists(st.integers(1, 3), max_size=3)
    # A dim of 1 may be fused from none.
    fused = [
        draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)),
        *draw(st.lists(group, max_size=2)),
    ]
    split = tuple(size for sizes in fused for size in sizes)
    shape = tuple(int(np.prod(sizes)) for sizes in fused)
    order = tuple(draw(st.permutations(range(len(split)))))
    begin = tuple(draw(st.integers(0, split[i] - 1)) for i in order)
    counts = tuple(draw(st.integers(1, split[i] - b)) for i, b in zip(order, begin, strict=True))
    return split, shape, order, begin, counts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_boxes())
def test_a_box_of_a_leaf_lies_where_the_published_tensor_has_it(drawn):
    split, shape, order, begin, counts = drawn
    wanted = np.arange(int(np.prod(shape))).reshape(shape)
    rule = Rule("t", shape, "leaf", (1,), split, order)
    leaf = np.stack([np.zeros_like(rule.to_block(wanted)), rule.to_block(wanted)])
    cut = tuple(slice(b, b + n) for b, n in zip(begin, counts, strict=True))
    part = leaf[(slice(1, 2), *cut)]
    box = Box.at((1, *begin), part.shape)
    flat = np.full(wanted.size, -1)
    for place, array in pieces.published(rule, box, part):
        for first, index in pieces.runs(place, shape):
            run = array[index].reshape(-1)
            assert (flat[first : first + run.size] == -1).all()
            flat[first : first + run.size] = run
        assert np.array_equal(wanted[place.slices], array)
    inside = np.isin(wanted.reshape(-1), part)
    assert np.array_equal(flat, np.where(inside, wanted.reshape(-1), -1))
