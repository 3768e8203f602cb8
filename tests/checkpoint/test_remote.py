"""A directory in object storage: the same model, read in ranges, and refused for the same."""

import contextlib
import http.server
import json
import re
import shutil
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

import hybrid_jax
from hybrid_jax import checkpoint
from hybrid_jax.checkpoint import comparison, leaves
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats import remote
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.remote import RemoteFile, RemoteFolder, is_remote
from hybrid_jax.cli import main
from tests.checkpoint import published

fsspec = pytest.importorskip("fsspec")
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = published.original_config()
    tensors = published.tensors(config)
    return published.write_directory(tmp_path_factory.mktemp("d") / "m", config, tensors, shards=3)


@pytest.fixture
def memory(directory):
    """The directory in fsspec's memory: (what a user types, the file system, the path in it)."""
    filesystem = fsspec.filesystem("memory")
    for file in directory.iterdir():
        filesystem.pipe_file(f"/bucket/m/{file.name}", file.read_bytes())
    yield "memory://bucket/m", filesystem, "/bucket/m"
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm("/bucket", recursive=True)


def same(one, other):
    a, b = leaves.arrays(one), leaves.arrays(other)
    return all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a | b)


def test_the_model_is_that_of_the_disk(directory, memory):
    assert same(hybrid_jax.load(memory[0] + "/"), hybrid_jax.load(directory))


def test_what_is_remote():
    assert all(map(is_remote, ("s3://b/m", "gs://b/m", "memory://m", "abfs+x://b")))
    assert not any(map(is_remote, ("/a/b", "a", "C:/x", "./s3:/x", "a//b://")))


def test_a_part_is_a_few_requests_and_few_bytes(memory, monkeypatch):
    asked = []
    filesystem = memory[1]
    array = np.arange(1 << 20, dtype=np.uint16).reshape(1024, 1024).view(ml_dtypes.bfloat16)
    filesystem.mkdir("/bucket/large")
    raw = published.header(
        {"a": {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [0, 1 << 21]}}
    )
    filesystem.pipe_file("/bucket/large/model.safetensors", raw + array.tobytes())
    get = filesystem.cat_file

    def cat_file(path, start=None, end=None, **options):
        asked.append(end - start)
        return get(path, start, end, **options)

    monkeypatch.setattr(filesystem, "cat_file", cat_file)
    with contextlib.closing(HfDirectory(RemoteFolder("memory://bucket/large"))) as source:
        asked.clear()
        # A request for every row would take longer than what lies between them.
        part = source.read_part("a", (1024, 1024), Box((100, 10), (200, 20)))
        assert part.tobytes() == array[100:200, 10:20].tobytes()
        assert asked == [99 * 2048 + 20] and source.bytes_read == asked[0]
        monkeypatch.setattr(RemoteFile, "gap_bytes", 2000)
        source.read_part("a", (1024, 1024), Box((100, 10), (102, 20)))
        assert asked[1:] == [20, 20]


def _index(change):
    def damage(filesystem, path):
        index = json.loads(filesystem.cat_file(f"{path}/{INDEX}"))
        change(index["weight_map"])
        filesystem.pipe_file(f"{path}/{INDEX}", json.dumps(index).encode())

    return damage


def _shard(change):
    def damage(filesystem, path):
        content = filesystem.cat_file(f"{path}/{SHARD}")
        filesystem.pipe_file(f"{path}/{SHARD}", change(content))

    return damage


DAMAGED = {
    "outside": (
        _index(lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        "points to '../x",
    ),
    "elsewhere": (
        _index(lambda m: m.update({"lm_head.weight": "s3://b/x.safetensors"})),
        "points to 's3://b/x",
    ),
    "missing": (lambda fs, path: fs.rm(f"{path}/{SHARD}"), f"should be in {SHARD}, but"),
    "truncated": (_shard(lambda content: content[:-5]), f"{SHARD} is truncated"),
    "twice": (
        lambda fs, path: fs.cp_file(f"{path}/{SHARD}", f"{path}/{SHARD.replace('2', '1', 1)}"),
        "is also in",
    ),
    "not named": (
        lambda fs, path: fs.pipe_file(f"{path}/more.safetensors", b"x"),
        "more.safetensors is not named",
    ),
    "pickle": (_shard(lambda content: b"PK\x03\x04" + content[4:]), f"{SHARD} is a PyTorch pickle"),
    "no config": (lambda fs, path: fs.rm(f"{path}/config.json"), "config.json is missing"),
    "no index": (lambda fs, path: fs.rm(f"{path}/{INDEX}"), "3 safetensors files"),
    "nothing": (lambda fs, path: fs.rm(path, recursive=True), "does not exist"),
}


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_what_is_refused_on_a_disk_is_refused_there(memory, damage, message):
    url, filesystem, path = memory
    damage(filesystem, path)
    with pytest.raises(ValueError, match=f"memory://bucket/m.*{re.escape(message)}"):
        hybrid_jax.load(url)


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(memory):
    url, filesystem, path = memory
    with contextlib.closing(HfDirectory(RemoteFolder(url))) as source:
        tensors = source.read_many(source.tensors)
        next(tensors)
        filesystem.pipe_file(f"{path}/{SHARD}", filesystem.cat_file(f"{path}/{SHARD}"))
        with pytest.raises(ValueError, match=rf"{SHARD} has changed since it was opened"):
            list(tensors)


def test_what_to_install_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"foo://b/m cannot be read: Protocol not known"):
        hybrid_jax.load("foo://b/m")
    with pytest.raises(ValueError, match=r"file:///b/m is on a disk: give the path without"):
        hybrid_jax.load("file:///b/m")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://b/m cannot be read: .*s3fs"):
        hybrid_jax.load("s3://b/m")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"pip install 'hybrid-jax\[remote\]'"):
        hybrid_jax.load("s3://b/m")


class _Plain(http.server.SimpleHTTPRequestHandler):
    """Answers every request with the whole file."""

    def log_message(self, *_):
        pass


class _Ranges(_Plain):
    """Knows ranges."""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return super().do_GET()
        begin, end = int(wanted[1]), int(wanted[2]) + 1
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content[begin:end])))
        self.end_headers()
        self.wfile.write(content[begin:end])


@contextlib.contextmanager
def _serving(directory, handler):
    with http.server.ThreadingHTTPServer(
        ("localhost", 0), lambda *args: handler(*args, directory=str(directory))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_web_server_with_ranges_serves_a_model_and_one_without_is_refused(directory):
    pytest.importorskip("aiohttp")
    with _serving(directory, _Ranges) as url:
        assert same(hybrid_jax.load(url), hybrid_jax.load(directory))
    with (
        _serving(directory, _Plain) as url,
        pytest.raises(ValueError, match=r"safetensors: 9 bytes were asked for .* knows? ranges"),
    ):
        hybrid_jax.load(url)


# Two units, so that there is work for two.
GROUP = 10_000
COMPANY = {
    "tokenizer.json": b'{"a": 1}',
    "generation_config.json": b"{}\n",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "LICENSE": b"MIT",
    "original/notes.txt": b"stays",
}


@pytest.fixture(scope="module")
def released(directory, tmp_path_factory):
    """The directory with its company: (itself, what it becomes as Orbax, and back)."""
    path = tmp_path_factory.mktemp("released")
    shutil.copytree(directory, path / "src")
    for name, content in COMPANY.items():
        (path / "src" / name).parent.mkdir(exist_ok=True)
        (path / "src" / name).write_bytes(content)
    checkpoint.convert(path / "src", path / "orbax", "orbax", group_bytes=GROUP)
    checkpoint.convert(path / "orbax", path / "back", "hf-original", shard_bytes=20_000)
    return path / "src", path / "orbax", path / "back"


def _contents(path, *but):
    files = (file for file in path.rglob("*") if file.is_file() and file.name not in but)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_a_conversion_from_storage_is_that_of_the_disk(released, tmp_path):
    pytest.importorskip("aiohttp")
    src, orbax, back = released
    with _serving(src, _Ranges) as url:
        # A worker opens the storage again.
        checkpoint.convert(url, tmp_path / "orbax", "orbax", workers=2, group_bytes=GROUP)
        assert len(list((tmp_path / "orbax" / "weights").iterdir())) == 2
        assert not comparison.compare(url, tmp_path / "orbax").differences
    checkpoint.convert(tmp_path / "orbax", tmp_path / "back", "hf-original", shard_bytes=20_000)
    # The manifest names what it was made from, which is not the same; Orbax's own files hold times.
    assert _contents(tmp_path / "back", "manifest.json") == _contents(back, "manifest.json")
    index = json.loads((tmp_path / "orbax" / "hybrid_jax.json").read_text())
    assert index == json.loads((orbax / "hybrid_jax.json").read_text())
    travelled = {name: (tmp_path / "back" / name).read_bytes() for name in [*COMPANY][:-1]}
    assert travelled == {name: COMPANY[name] for name in travelled}
    assert not (tmp_path / "back" / "original").exists()


def test_a_conversion_tells_one_version_of_a_file_from_the_next(memory, tmp_path):
    url, filesystem, path = memory
    filesystem.pipe_file(f"{path}/tokenizer.json", b"1")
    checkpoint.convert(url, tmp_path / "dst", "orbax")
    # The same once more is done already.
    assert checkpoint.convert(url, tmp_path / "dst", "orbax", process=1, of=2).written == 0
    filesystem.pipe_file(f"{path}/tokenizer.json", b"2")
    with pytest.raises(ValueError, match=r"exists|not empty"):
        checkpoint.convert(url, tmp_path / "dst", "orbax", process=1, of=2)


def test_a_shard_that_changes_after_its_header_leaves_nothing_written(memory, tmp_path):
    url, filesystem, path = memory
    content = filesystem.cat_file(f"{path}/{SHARD}")

    def replace(done, total, name):
        filesystem.pipe_file(f"{path}/{SHARD}", content)

    with pytest.raises(ValueError, match=rf"{SHARD} has changed since it was opened"):
        checkpoint.convert(url, tmp_path / "dst", "orbax", progress=replace, group_bytes=4096)
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_and_a_look_need_config_and_index_only(memory, capsys):
    url, filesystem, path = memory
    assert main(["inspect", url]) == 0
    for file in filesystem.ls(path, detail=False):
        if file.endswith(".safetensors"):
            filesystem.rm(file)
    assert main(["convert", url, "--format", "hf", "--dry-run"]) == 0
    assert "stored tensors have their place" in capsys.readouterr().out
    _index(lambda names: names.pop("lm_head.weight"))(filesystem, path)
    assert main(["convert", url, "--format", "hf", "--dry-run"]) == 2
    assert "lm_head.weight" in capsys.readouterr().err


def test_a_destination_in_storage_is_refused(memory, tmp_path, directory):
    with pytest.raises(ValueError, match="destination must be on a disk"):
        checkpoint.convert(directory, "memory://bucket/dst", "orbax")
    assert main(["verify", memory[0]]) == 2


def test_long_tensors_come_in_pieces_and_short_ones_ahead(memory, monkeypatch):
    url, filesystem, _ = memory
    get, asked, lock = filesystem.cat_file, [], threading.Lock()
    two = threading.Barrier(2, timeout=30)

    def cat_file(path, start=None, end=None, **options):
        with lock:
            asked.append(end - start)
            first = len(asked) <= 2
        if first:
            # Passed by two requests that are under way at once only.
            two.wait()
        return get(path, start, end, **options)

    with contextlib.closing(HfDirectory(RemoteFolder(url))) as source:
        whole = dict(source.read_many(source.tensors))
        monkeypatch.setattr(filesystem, "cat_file", cat_file)
        for pieces, ahead in ((100, 1), (1 << 24, 1 << 20)):
            asked.clear()
            monkeypatch.setattr(remote, "_PIECE_BYTES", pieces)
            monkeypatch.setattr(remote, "AHEAD_BYTES", 8 * pieces)
            monkeypatch.setattr(RemoteFile, "ahead_bytes", ahead)
            for name, array in source.read_many(source.tensors):
                assert array.tobytes() == whole[name].tobytes()
            # Every byte once.
            assert sum(asked) == sum(array.nbytes for array in whole.values())
            assert max(asked) <= pieces
