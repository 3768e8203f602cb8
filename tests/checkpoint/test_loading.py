"""Parameters on a mesh are those of one device; processes read their own part of the bytes."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import hybrid_jax
from hybrid_jax.checkpoint import convert, leaves, loading, parts
from hybrid_jax.checkpoint.opened import open_checkpoint
from hybrid_jax.model.parallel import placement as placements
from tests.checkpoint import large, loaded, published
from tests.checkpoint.published import FP8_CONFIG, m2_config, original_config
from tests.sharding import together


def _m2(path: pathlib.Path):
    config = m2_config(quantization_config=FP8_CONFIG, num_local_experts=4)
    tensors = published.quantised(published.tensors(config))
    return published.write_directory(path, config, tensors, shards=2)


def _original(path: pathlib.Path):
    config = original_config(num_local_experts=4)
    return published.write_directory(path, config, published.tensors(config), shards=2)


def _orbax(path: pathlib.Path):
    convert(_original(path.with_suffix(".hf")), path, "orbax")
    return path


@pytest.mark.parametrize(
    "make, mesh, rules",
    [
        (_original, "fsdp=2,expert=2,tensor=2", "expert"),
        # Copies along data, and parameters that no axis splits.
        (_m2, "data=4,tensor=2", "serve"),
        pytest.param(_orbax, "fsdp=4,tensor=2", "fsdp_tensor", marks=pytest.mark.nightly),
    ],
)
def test_a_mesh_holds_what_one_device_does(tmp_path, monkeypatch, make, mesh, rules):
    path = make(tmp_path / "src")
    placement = placements.make(mesh, rules)
    one = hybrid_jax.load(path, dtype="bfloat16")
    wanted = leaves.arrays(nnx.merge(nnx.split(one)[0], placement.place(nnx.split(one)[1])))
    # Put together on the host; then all on the devices, in small pieces.
    for host_bytes, piece_bytes in ((1 << 26, 1 << 24), (0, 512)):
        monkeypatch.setattr(loading, "HOST_BYTES", host_bytes)
        monkeypatch.setattr(parts, "PIECE_BYTES", piece_bytes)
        found = leaves.arrays(hybrid_jax.load(path, dtype="bfloat16", placement=placement))
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            assert array.sharding == wanted[name].sharding and array.dtype == wanted[name].dtype
            assert np.array_equal(np.asarray(array), np.asarray(wanted[name])), name


def test_every_byte_is_read_once_however_many_devices_share_it(tmp_path):
    path = _original(tmp_path / "src")
    placement = placements.make("data=2,expert=2,tensor=2", "expert")
    with open_checkpoint(path) as checkpoint:
        where = leaves.shardings(checkpoint.config, placement)
        for leaf, shape in checkpoint.shapes.items():
            loading.load(checkpoint, leaf, shape, np.float32, where[leaf])
        assert checkpoint.source.bytes_read == sum(
            info.nbytes for info in checkpoint.source.tensors.values()
        )


def test_of_several_processes_one_shows_each_part(monkeypatch):
    class Sharding:
        """Copies over two processes of two devices each, split in two."""

        def devices_indices_map(self, shape):
            device = collections.namedtuple("Device", "id process_index")
            return {device(n, n // 2): (slice(4 * (n % 2), 4 * (n % 2) + 4),) for n in range(4)}

    shown = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shown += loading._mine((8,), Sharding())
    assert sorted(box.begin for box in shown) == [(0,), (4,)]


def test_dims_that_do_not_divide_are_refused_before_anything_is_read(tmp_path):
    path = _original(tmp_path / "src")
    with pytest.raises(ValueError, match=r"does not divide by tensor=8"):
        hybrid_jax.load(path, placement=placements.make("tensor=8", "serve"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Experts so wide that half of a row is longer than what is read along."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 8}
    config = original_config("ls", intermediate_size=20480, **sizes)
    path = tmp_path_factory.mktemp("wide") / "src"
    return published.write_directory(path, config, published.tensors(config), shards=3)


def test_two_processes_read_half_of_the_bytes_each(wide, tmp_path):
    script = pathlib.Path(loaded.__file__)
    convert(wide, tmp_path / "orbax", "orbax")
    started = together.start(2, 4, [script, wide, tmp_path / "orbax"], tmp_path / "logs")
    codes = together.wait(started, 300)
    said = [together.lines(tmp_path / "logs", process) for process in (0, 1)]
    assert codes == [0, 0], said
    for lines in said:
        parts_read = [(mesh, part) for mesh, _, _, part in loaded.CASES] + [("orbax", 0.5)]
        assert len(lines) == len(parts_read) + 1
        for (mesh, part), line in zip(parts_read, lines, strict=False):
            name, read, total = line.split()
            # Norms and routers, which both hold, are less than a hundredth.
            assert name == mesh and part <= int(read) / int(total) <= part + 0.01, line
        assert lines[-1].startswith("refused") and "none does not exist" in lines[-1]
    assert said[0][-1] == "refused process 1: " + said[1][-1].removeprefix("refused ")


MEASURE = """
import json, pathlib, sys
import hybrid_jax
from hybrid_jax.checkpoint import leaves, loading, parts
from hybrid_jax.model.parallel import placement as placements
tiny, large, piece = sys.argv[1], sys.argv[2], int(sys.argv[3])
parts.PIECE_BYTES, loading.HOST_BYTES = piece, 0
placement = placements.make("expert=2", "expert")
def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
# Libraries and compilers are there before the measurement.
hybrid_jax.load(tiny, dtype="bfloat16", placement=placement)
# The peak of a process begins with that of the one that started it: forget it.
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
kept = leaves.arrays(hybrid_jax.load(large, dtype="bfloat16", placement=placement))
peak = status("VmHWM")
held = sum(shard.data.nbytes for a in kept.values() for shard in a.addressable_shards)
mib = 2.0**-20
stack = max(a.nbytes for a in kept.values())
print(json.dumps({"more": (peak - before) / 1024 - held * mib, "held": held * mib,
                  "stack": stack * mib, "base": before / 1024}))
"""


@pytest.mark.parametrize(
    "layers, experts, piece, most",
    # Eight threads hold a piece each, and another one while they turn it; the rest, 50 MiB of the
    # 57 measured, is XLA's programs. A stack on the host would add its own 128.
    [
        (3, 8, 1 << 18, 96),
        pytest.param(8, 16, 1 << 24, 512, marks=pytest.mark.nightly),
    ],
)
def test_host_memory_is_a_few_pieces_and_never_a_stack(tmp_path, layers, experts, piece, most):
    tiny = _original(tmp_path / "tiny")
    directory = tmp_path / "large"
    large.write(directory, layers, experts)
    # A user's process: the tests' eight devices have threads and memory pools of their own.
    plain = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", MEASURE, str(tiny), str(directory), str(piece)]
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    print({name: round(value, 1) for name, value in report.items()})
    assert report["more"] < most < report["stack"], report
