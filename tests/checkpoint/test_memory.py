"""A conversion holds a few tensors, not the model, and every bit comes back.

Peak memory is that of processes of their own, whatever the tests hold.
"""

import json
import os
import subprocess
import sys

import pytest

from scripts import bench_conversion

# What a process of ours holds before it converts anything, 240 MB of it libraries; and a group of
# Orbax's, 32 MiB, up to three times while it is written or read. The aim is 1 GB.
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
    "size, layers",
    # The names and shards of eight layers every day, of all eighty every night.
    [(500e6, 8), pytest.param(8e9, 80, marks=pytest.mark.nightly)],
)
def test_there_and_back_every_bit_is_the_same_in_the_memory_of_a_few_tensors(
    tmp_path, size, layers
):
    source = tmp_path / "source"
    made = bench_conversion.write(source, size, layers)
    assert 0.9 * size < made.nbytes < 1.1 * size
    assert len(made.infos) == 3 + 103 * layers
    there = _convert(source, tmp_path / "orbax", "orbax")
    # The files of the source, to the byte.
    shards = ("--shard-gb", f"{made.shard_bytes / 1e9:.9f}")
    back = _convert(tmp_path / "orbax", tmp_path / "back", "hf-original", *shards)
    print({"there": there, "back": back, "largest": made.largest})
    for report in (there, back):
        assert report["bytes"] == made.nbytes
        assert report["peak_rss_bytes"] < BASE + 3 * made.largest
    assert bench_conversion.same(source, tmp_path / "back")
