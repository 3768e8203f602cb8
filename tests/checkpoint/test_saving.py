"""Sharded models become the files that an unsharded one becomes, each process writing its part."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import hybrid_jax
from hybrid_jax.checkpoint import digests, hf_config, leaves, manifest, pieces
from hybrid_jax.checkpoint.names.rules import Rule
from tests.checkpoint import published
from tests.sharding import together

# Every dim that may be split, over devices of one process ("near") and across processes ("far"): a
# tensor is then whole in one process, in rows of both, in columns of both, or in pieces of a fused
# dim. What is not listed is on all devices.
SPLIT = {
    "embedding.table": (("near", "far"), None),
    "head.kernel": ("far", "near"),
    "mixer.qkv": (None, None, "near", None, None, "far"),
    "mixer.gate": (None, None, "far", "near", None),
    "mixer.out": (None, None, "near", None, "far"),
    "mixer.q": (None, None, None, "near", "far"),
    "ffn.gate_up": (None, None, "near", None, None, "far"),
    "ffn.down": (None, None, "near", "far", None),
    "ffn.router": (None, None, None, "near"),
}


def model_of():
    """40 MB of random numbers, the same wherever it is made."""
    values = published.original_config(
        hidden_size=256,
        intermediate_size=512,
        num_local_experts=8,
        head_dim=64,
        num_attention_heads=4,
        vocab_size=4096,
    )
    draw = np.random.default_rng(0)
    return leaves.fill(
        hf_config.describe(values, "config.json").model,
        lambda _, shape, dtype: draw.standard_normal(shape, np.float32).astype(dtype),
    )


def placed(model, devices):
    """The model on eight devices, four of each process."""
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("far", "near"))
    graph, state = nnx.split(model)

    def place(path, param):
        name = ".".join(map(str, path))
        spec = next((split for end, split in SPLIT.items() if name.endswith(end)), ())
        sharding, values = NamedSharding(mesh, PartitionSpec(*spec)), np.asarray(param[...])
        return param.replace(
            jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
        )

    flat = [(path, place(path, param)) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _weights(directory) -> dict[str, bytes]:
    names = ("*.safetensors", "*.index.json", "config.json", "tokenizer.json")
    return {path.name: path.read_bytes() for name in names for path in directory.glob(name)}


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """What one process writes of a model on one device."""
    out = tmp_path_factory.mktemp("alone")
    company = out / "company"
    company.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (company / name).write_text("{}")
    for format in ("hf-original", "hf", "orbax"):
        hybrid_jax.save(model, out / format, format, sidecars=company, shard_bytes=2_000_000)
    return out


def test_a_model_on_eight_devices_becomes_the_same_files(model, alone, tmp_path):
    split = placed(model, jax.devices())
    hybrid_jax.save(split, tmp_path / "hf", "hf", sidecars=alone / "company", shard_bytes=2_000_000)
    assert _weights(tmp_path / "hf") == _weights(alone / "hf")
    one, other = manifest.verify(tmp_path / "hf"), manifest.verify(alone / "hf")
    assert (one.files, one.arrays) == (other.files, other.arrays)


def test_two_processes_write_half_each_and_the_same_files(alone, tmp_path):
    arguments = ("-m", "tests.checkpoint.saved", tmp_path, alone / "company")
    started = together.start(2, 4, arguments, tmp_path / "logs")
    codes = together.wait(started, 300)
    logs = [together.lines(tmp_path / "logs", process) for process in range(2)]
    assert codes == [0, 0], logs
    for process in range(2):
        *said, last = (json.loads(line) for line in logs[process] if line.startswith("{"))
        for report in said:
            total = sum(len(data) for data in _weights(alone / "hf").values())
            assert 0.4 < report["written"] / total < 0.6, (report, total)
        assert "exists and is not empty" in last["error"]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hf",
        "hf-original",
        "logs",
        "orbax",
    ]


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
    box = pieces.Box((1, *begin), part.shape)
    flat = np.full(wanted.size, -1)
    for place, array in pieces.published(rule, box, part):
        for first, index in pieces.runs(place, shape):
            run = array[index].reshape(-1)
            assert (flat[first : first + run.size] == -1).all()
            flat[first : first + run.size] = run
        here = tuple(slice(b, b + n) for b, n in zip(place.begin, place.shape, strict=True))
        assert np.array_equal(wanted[here], array)
    inside = np.isin(wanted.reshape(-1), part)
    assert np.array_equal(flat, np.where(inside, wanted.reshape(-1), -1))
