"""Whatever happens to a stored checkpoint is found and named before anything is read of it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.checkpoint import digests, manifest

CONTENTS = {
    "params/0.bin": np.random.default_rng(0).bytes(3000),
    "params/1.bin": np.random.default_rng(1).bytes(3000),
    "optimizer/d/0.bin": np.random.default_rng(2).bytes(100),
    "_METADATA": b"{}",
    "empty": b"",
}


def arrays(change=lambda name, x: x):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    made = {
        "w": jax.device_put(jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), split),
        "v": jax.device_put(jnp.arange(32, 64, dtype=jnp.bfloat16).reshape(8, 4), split),
        "step": jax.device_put(jnp.int32(7), whole),
    }
    return {name: change(name, x) for name, x in made.items()}


def spoilt(x):
    """The same array where it was, with one number changed."""
    values = np.array(x)
    values[5, 1] += 1
    return jax.device_put(values, x.sharding)


def store(directory):
    for name, contents in CONTENTS.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return manifest.write(directory, digests.describe(digests.hold(arrays())))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    store(directory)
    return directory


def test_what_was_written_is_verified(stored):
    found = manifest.verify(stored)
    assert found == manifest.read(stored) and set(found.files) == set(CONTENTS)
    assert [len(found.arrays[name].shards) for name in ("w", "v", "step")] == [4, 4, 1]
    digests.check(found.arrays, arrays())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_no_flipped_bit_goes_unseen(stored, data):
    name = data.draw(st.sampled_from([*[n for n in CONTENTS if CONTENTS[n]], manifest.NAME]))
    path = stored / name
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    path.write_bytes(after)
    try:
        with pytest.raises(manifest.Damaged, match=name.replace(".", r"\.")):
            manifest.verify(stored)
    finally:
        path.write_bytes(before)


def _truncate(directory):
    (directory / "params/0.bin").write_bytes(CONTENTS["params/0.bin"][:-1])


def _rewrite(path, change):
    path.write_text(change(path.read_text()))


def _swap(directory):
    (directory / "params/0.bin").write_bytes(CONTENTS["params/1.bin"])
    (directory / "params/1.bin").write_bytes(CONTENTS["params/0.bin"])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_truncate, r"params/0\.bin has 2999 bytes, not 3000"),
        (_swap, r"params/0\.bin has other contents .*; params/1\.bin has other contents"),
        (lambda d: (d / "optimizer/d/0.bin").unlink(), r"optimizer/d/0\.bin is missing"),
        (lambda d: (d / "more").write_text("x"), "more was not written by it"),
        (lambda d: _rewrite(d / manifest.NAME, lambda text: text[:-1]), "in another form"),
        (lambda d: (d / manifest.NAME).write_text("{}"), r"manifest\.json is damaged"),
        (lambda d: (d / manifest.NAME).write_text("[" * 100_000), r"manifest\.json is damaged"),
    ],
)
def test_what_was_done_is_said(tmp_path, harm, message):
    store(tmp_path)
    harm(tmp_path)
    with pytest.raises(manifest.Damaged, match=message):
        manifest.verify(tmp_path)


def test_an_unfinished_directory_has_no_manifest(stored, tmp_path, monkeypatch):
    shutil.copytree(stored, tmp_path / "copy")
    (tmp_path / "copy" / manifest.NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        manifest.verify(tmp_path / "copy")
    # Killed between the draft of the manifest and its name.
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.write(tmp_path / "copy")
    assert not (tmp_path / "copy" / manifest.NAME).exists()


def test_a_forged_manifest_of_another_form_is_refused(stored, tmp_path):
    body = json.loads((stored / manifest.NAME).read_text()) | {"format": 2}
    del body["sha256"]
    body["sha256"] = manifest._own_digest(body)
    (tmp_path / manifest.NAME).write_text(json.dumps(body))
    with pytest.raises(manifest.Damaged, match="its format is 2; this version reads 1"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("begin", [["x", 0], [0], [-1, 0], 5])
def test_a_forged_place_of_a_shard_is_refused(stored, begin):
    whole = digests.to_json(manifest.read(stored).arrays)
    assert digests.from_json(whole) == manifest.read(stored).arrays
    whole["w"]["shards"][0]["begin"] = begin
    with pytest.raises(TypeError):
        digests.from_json(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, x: x.astype(jnp.float32) if name == "w" else x,
            r"w is float32\[8, 4\], not b",
        ),
        (lambda name, x: x.T if name == "v" else x, r"v is bfloat16\[4, 8\], not bfloat16\[8, 4\]"),
        (lambda name, x: spoilt(x) if name == "w" else x, r"w has .* in the part .*'4:6'"),
        (lambda name, x: arrays()["v"] if name == "w" else x, "w has other contents"),
    ],
)
def test_arrays_are_bound_to_name_shape_dtype_and_contents(stored, change, message):
    with pytest.raises(manifest.Damaged, match=message):
        digests.check(manifest.read(stored).arrays, arrays(change))


def test_what_is_held_is_what_was_there_whatever_becomes_of_the_array():
    def given():
        return arrays() | {"one": jax.device_put(jnp.arange(4096.0), jax.devices()[0])}

    update = jax.jit(lambda x: -x, donate_argnums=0)
    wanted, taken = digests.describe(digests.hold(given())), given()
    held = digests.hold(taken)
    for array in taken.values():
        update(array).block_until_ready()
        array.delete()
    assert digests.describe(held) == wanted


def test_arrays_may_return_to_other_devices(stored):
    moved = {name: jax.device_put(x, jax.devices()[5]) for name, x in arrays().items()}
    digests.check(manifest.read(stored).arrays, moved)
    with pytest.raises(manifest.Damaged, match=r"v has other contents in the part .*'4:6'"):
        digests.check(manifest.read(stored).arrays, moved | {"v": spoilt(moved["v"])})
    with pytest.raises(manifest.Damaged, match=r"more is not in its manifest; v is missing"):
        digests.check(
            manifest.read(stored).arrays,
            {"w": moved["w"], "step": moved["step"], "more": moved["v"]},
        )
