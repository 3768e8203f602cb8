"""A conversion holds a few tensors, not the model, and every bit comes back.

Peak memory is that of processes of their own, whatever the tests hold.
"""

import json
import os
import subprocess
import sys

import pytest

from scripts import bench_conversion
from tests.checkpoint import large, published

# What a process of ours holds before it converts anything, 240 MB of it libraries; and a group of
# Orbax's, 32 MiB, up to three times while it is written or read.
BASE = 450_000_000


def _convert(source, target, format, *options) -> dict:
    report = target.with_suffix(".json")
    command = ["convert", source, target, "--format", format, "--json", report, *options]
    # A user's process: the tests' simulated devices have threads and memory pools of their own.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-m", "hybrid_jax.cli", *map(str, command)],
        capture_output=True,
        text=True,
        env=plain,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize(
    "size, layers, base",
    # The names and shards of eight layers every day, of all eighty every night: that in as many
    # processes as are taken of themselves, which may have 1 GB together.
    [(500e6, 8, BASE), pytest.param(8e9, 80, 1e9, marks=pytest.mark.nightly)],
)
def test_there_and_back_every_bit_is_the_same_in_the_memory_of_a_few_tensors(
    tmp_path, size, layers, base
):
    source = tmp_path / "source"
    made = bench_conversion.write(source, size, layers)
    assert 0.9 * size < made.nbytes < 1.1 * size
    assert len(made.infos) == 3 + 103 * layers
    there = _convert(source, tmp_path / "orbax", "orbax")
    # In files as small as those of the source.
    shards = ("--shard-gb", f"{made.shard_bytes / 1e9:.9f}")
    back = _convert(tmp_path / "orbax", tmp_path / "back", "hf-original", *shards)
    print({"there": there, "back": back, "largest": made.largest})
    for report in (there, back):
        assert report["bytes"] == made.nbytes
        assert report["peak_rss_bytes"] < base + 3 * made.largest
    assert bench_conversion.same(source, tmp_path / "back")


LOAD = """
import json, sys
import hybrid_jax
from hybrid_jax import model as models
from hybrid_jax.checkpoint.workers import peak_rss_bytes
tiny, large, scheme = sys.argv[1:4]
hybrid_jax.load(tiny, "bfloat16", quantize=scheme)
before = peak_rss_bytes()
model = hybrid_jax.load(large, "bfloat16", quantize=scheme)
mib = 2.0**-20
print(json.dumps({"peak": (peak_rss_bytes() - before) * mib,
                  "weights": models.size_in_bytes(model) * mib}))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_loading_quantised_never_holds_the_weights_unquantised(tmp_path, scheme):
    config = published.original_config()
    tiny = published.write_directory(tmp_path / "tiny", config, published.tensors(config))
    directory = tmp_path / "large"
    nbytes = large.write(directory, 3, 16)
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", LOAD, str(tiny), str(directory), scheme]
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["weights"] < 0.55 * nbytes * 2.0**-20
    # 110 to 195 MiB more than the weights of any size: a tensor of 4 MiB in float32 a few times, up
    # to 64 MiB of a parameter on the host, XLA's programs, and what glibc keeps of freed memory.
    assert report["peak"] < report["weights"] + 256 < nbytes * 2.0**-20, report
