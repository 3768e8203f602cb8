"""The container refuses every malformed file by name; it reads and writes as the library does."""

import contextlib
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from hybrid_jax.checkpoint import digests, manifest
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.protocol import DTYPES, TAGS, TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsLayout
from tests.checkpoint.published import header, write_directory, write_safetensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
LONG = 1 << 62

MALFORMED = {
    "empty": (b"", "8-byte header length"),
    "short": (b"\x10\0\0", "8-byte header length"),
    "header past the end": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "huge header": (LONG.to_bytes(8, "little") + b"{}", "the limit is"),
    "all ones": (b"\xff" * 40, "the limit is"),
    "not JSON": ((8).to_bytes(8, "little") + b"{nonono}", "header is bad"),
    "not UTF-8": ((8).to_bytes(8, "little") + b'{"\xff":1}x', "header is bad"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "not begin with an object"),
    "deep": ((20000).to_bytes(8, "little") + b"[" * 20000, "header is bad"),
    "truncated data": (header({"a": A}) + bytes(20), "truncated"),
    "trailing data": (header({"a": A}) + bytes(30), "6 bytes behind"),
    "hole": (
        header({"a": A, "b": A | {"data_offsets": [32, 56]}}) + bytes(56),
        "'b'.*leaves a hole",
    ),
    "overlap": (header({"a": A, "b": A | {"data_offsets": [8, 32]}}) + bytes(32), "'b'.*overlaps"),
    "late start": (header({"a": A | {"data_offsets": [8, 32]}}) + bytes(32), "'a'.*hole"),
    "shape and offsets": (header({"a": A | {"shape": [2, 4]}}) + bytes(24), "32 bytes.*span 24"),
    "overflowing shape": (header({"a": A | {"shape": [LONG, LONG]}}) + bytes(24), "'a'.*>= 0 of"),
    "negative size": (header({"a": A | {"shape": [-2, -3]}}) + bytes(24), "'a'.*>= 0"),
    "negative offset": (header({"a": A | {"data_offsets": [-24, 0]}}) + bytes(24), "'a'.*>= 0"),
    "true as size": (header({"a": A | {"shape": [True, 6]}}) + bytes(24), "'a'.*>= 0"),
    "unknown dtype": (header({"a": A | {"dtype": "F31"}}) + bytes(24), "'a'.*'F31'"),
    "dtype as list": (header({"a": A | {"dtype": ["F32"]}}) + bytes(24), "'a'"),
    "field missing": (header({"a": {"dtype": "F32", "shape": [6]}}) + bytes(24), "data_offsets"),
    "unknown field": (header({"a": A | {"code": "x"}}) + bytes(24), "'a'"),
    "entry is a number": (header({"a": 3}), "'a'"),
    "duplicate key": (
        (len(b'{"a":1,"a":1}')).to_bytes(8, "little") + b'{"a":1,"a":1}',
        "'a' stands twice",
    ),
    "pickle": (pickle.dumps({"a": [1.0] * 100}), "pickle.*never opened"),
    "pickle 2": (pickle.dumps({"a": [1.0] * 100}, protocol=2), "pickle.*never opened"),
    "zipped pickle": (b"PK\x03\x04" + bytes(100), "pickle.*never opened"),
}


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_run(tmp_path, protocol):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(ValueError, match="pickle"):
        HfDirectory(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    raw = json.dumps({"a": A}).encode()
    raw += b" " * (length - len(raw))
    (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + raw + bytes(24))
    with contextlib.closing(SafetensorsFile(tmp_path / "m.safetensors")) as file:
        assert file.read("a").shape == (2, 3)


def test_every_dtype_comes_back_as_it_was_written_and_as_the_library_reads_it(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {tag: draw.integers(0, 2, (3, 5)).astype(dtype) for tag, dtype in DTYPES.items()} | {
        "scalar": np.array(2.0, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    plan = [TensorInfo(name, TAGS[array.dtype], array.shape) for name, array in arrays.items()]
    _write(tmp_path, SafetensorsLayout(plan), arrays)
    with contextlib.closing(SafetensorsFile(tmp_path / "model.safetensors")) as file:
        for name, array in arrays.items():
            again = file.read(name)
            assert again.dtype == array.dtype and np.array_equal(again, array), name
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as theirs:
        assert set(theirs.keys()) == set(arrays)
        assert theirs.metadata() == {"format": "pt"}
        for name in ("F32", "F16", "I64", "BOOL", "scalar", "empty"):
            assert np.array_equal(theirs.get_tensor(name), arrays[name]), name


def test_shards_keep_to_the_limit_and_the_index_names_every_tensor(tmp_path):
    arrays = {f"t{i}": np.full((16,), i, ml_dtypes.bfloat16) for i in range(7)}
    arrays["large"] = np.ones((100,), np.float32)
    plan = [TensorInfo(name, TAGS[array.dtype], array.shape) for name, array in arrays.items()]
    _write(tmp_path, SafetensorsLayout(plan, shard_bytes=96), arrays)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 32 + 400
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    with contextlib.closing(HfDirectory(tmp_path)) as directory:
        for name, array in directory.read_many(arrays):
            assert np.array_equal(array, arrays[name])


def test_a_planned_tensor_that_never_comes_or_is_another_leaves_no_file(tmp_path):
    layout = SafetensorsLayout([TensorInfo("a", "F32", (2,)), TensorInfo("b", "F32", (2,))])
    with pytest.raises(ValueError, match=r"'a' was planned as F32\[2\] but came as float64\[2\]"):
        layout.write(tmp_path, 0, iter([np.zeros((2,))]))
    with pytest.raises(ValueError, match="shorter"):
        layout.write(tmp_path, 0, iter([np.zeros((2,), np.float32)]))
    assert not (tmp_path / "model.safetensors").exists()


def test_digests_are_those_of_the_files_and_tensors_as_they_lie_there(tmp_path):
    arrays = {"narrow": np.arange(5, dtype=np.float16).astype(ml_dtypes.bfloat16)}
    arrays["wide"] = np.arange(6, dtype=np.float32).reshape(3, 2).T
    plan = [TensorInfo(name, TAGS[array.dtype], array.shape) for name, array in arrays.items()]
    (written,) = _write(tmp_path, SafetensorsLayout(plan), arrays)
    assert written.files == manifest.hash_files(tmp_path)
    for name, array in arrays.items():
        digests.check_whole(name, written.arrays[name], np.ascontiguousarray(array))


def _write(directory, layout, arrays):
    """All units, as whoever has the arrays writes them."""
    written = [
        layout.write(directory, unit.number, (arrays[info.name] for info in unit.infos))
        for unit in layout.units
    ]
    layout.finish(directory, {})
    return written


def _sharded(tmp_path):
    arrays = {f"t{i}": np.full((4,), i, np.float32) for i in range(4)}
    return write_directory(tmp_path / "d", {}, arrays, shards=2)


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BAD_INDEX = {
    "missing file": (
        lambda m: m | {"t0": "model-00009-of-00002.safetensors"},
        "'t0'.*no such file",
    ),
    "parent": (lambda m: m | {"t0": "../model.safetensors"}, "'t0' points to '../model"),
    "absolute": (lambda m: m | {"t0": "/etc/model.safetensors"}, "'t0' points to '/etc"),
    "backslash": (lambda m: m | {"t0": "..\\x.safetensors"}, "'t0' points to"),
    "folder": (lambda m: m | {"t0": "sub/x.safetensors"}, "'t0' points to"),
    "number": (lambda m: m | {"t0": 3}, "'t0' points to 3"),
    "pickle": (lambda m: m | {"t0": "pytorch_model.bin"}, "'t0' points to"),
    "wrong shard": (lambda m: m | {"t0": SECOND}, f"'t0' is in {SECOND}"),
    "tensor nowhere": (lambda m: m | {"ghost": FIRST}, f"'ghost' is in {FIRST}"),
    "tensor not named": (
        lambda m: {k: v for k, v in m.items() if k != "t0"},
        f"{FIRST} holds 't0'",
    ),
    "a list": (lambda m: list(m), "must map tensor names"),
    "empty": (lambda m: {}, "must map tensor names"),
}


@pytest.mark.parametrize("change, message", BAD_INDEX.values(), ids=BAD_INDEX)
def test_a_bad_index_is_refused_by_name(tmp_path, change, message):
    directory = _sharded(tmp_path)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        HfDirectory(directory)


TWICE = '{"weight_map": {"t0": "a.safetensors", "t0": "b.safetensors"}}'


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", "[" * 20000, "\xff", TWICE])
def test_an_index_that_is_no_index_is_refused(tmp_path, content):
    directory = _sharded(tmp_path)
    (directory / INDEX).write_text(content)
    with pytest.raises(ValueError, match="weight_map"):
        HfDirectory(directory)


def test_files_that_nothing_accounts_for_are_refused(tmp_path):
    directory = _sharded(tmp_path)
    write_safetensors(directory / "more.safetensors", {"x": np.ones((1,), np.float32)})
    with pytest.raises(ValueError, match=r"more.safetensors is not named in"):
        HfDirectory(directory)
    (directory / INDEX).unlink()
    with pytest.raises(ValueError, match=r"3 safetensors files .* but no"):
        HfDirectory(directory)


def test_a_tensor_stored_twice_is_refused(tmp_path):
    directory = _sharded(tmp_path)
    write_safetensors(
        directory / SECOND, {n: np.full((4,), 1, np.float32) for n in ("t0", "t1", "t3")}
    )
    with pytest.raises(ValueError, match=f"{SECOND}: tensor 't0' is also in {FIRST}"):
        HfDirectory(directory)


def test_a_directory_of_pickles_is_refused_unread(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        HfDirectory(tmp_path)


def test_links_may_lead_to_the_hub_cache_and_nowhere_else(tmp_path):
    blobs, snapshot = tmp_path / "models" / "blobs", tmp_path / "models" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_safetensors(blobs / "f00", {"a": np.ones((2,), np.float32)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    with contextlib.closing(HfDirectory(snapshot)) as directory:
        assert directory.read("a").tolist() == [1.0, 1.0]
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "model.safetensors").symlink_to(blobs / "f00")
    with pytest.raises(ValueError, match="outside the directory"):
        HfDirectory(outside)
    (outside / "model.safetensors").unlink()
    (outside / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(ValueError, match="leads to no file"):
        HfDirectory(outside)
    (outside / INDEX).symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="outside the directory"):
        HfDirectory(outside)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / name).symlink_to("pipe")
    with pytest.raises(ValueError, match=f"{name} is a device or a pipe"):
        HfDirectory(tmp_path)
