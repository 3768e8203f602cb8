"""A conversion holds a few tensors, not the model: peak memory measured in a process of its own."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from hybrid_jax.checkpoint import hf_config
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors_writer import SafetensorsSink
from hybrid_jax.checkpoint.names import minimax
from tests.checkpoint import published

# Warm up on a tiny directory, so that libraries and their pools are there before the measurement.
MEASURE = """
import json, pathlib, shutil, sys
from hybrid_jax.checkpoint import convert
from hybrid_jax.checkpoint.convert import peak_rss_bytes
tiny, large, out = map(pathlib.Path, sys.argv[1:4])
def there_and_back(source, name):
    convert(source, out / f"{name}-orbax", "orbax")
    to_orbax = peak_rss_bytes()
    summary = convert(out / f"{name}-orbax", out / f"{name}-hf", "hf-original", shard_bytes=1 << 28)
    shutil.rmtree(out / f"{name}-orbax")
    return to_orbax, peak_rss_bytes(), summary
_, before, _ = there_and_back(tiny, "tiny")
to_orbax, back, summary = there_and_back(large, "large")
mib = 2.0**-20
print(json.dumps({"base": before * mib, "to_orbax": (to_orbax - before) * mib,
                  "back": (back - before) * mib, "bytes": summary.bytes,
                  "seconds": summary.seconds}))
"""


def _write(path, layers: int, experts: int):
    """A directory of experts of 4 MiB, written as it is made."""
    values = published.original_config(
        "l" * (layers - 1) + "s",
        hidden_size=1024,
        intermediate_size=2048,
        num_local_experts=experts,
        head_dim=128,
        num_attention_heads=8,
        vocab_size=2048,
    )
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    rules = minimax.rules(hf_config.describe(values, "config.json").model)
    sink = SafetensorsSink(path, [TensorInfo(rule.name, "BF16", rule.shape) for rule in rules])
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(3 << 21).astype(np.float32).astype(ml_dtypes.bfloat16)
    for rule in rules:
        size = int(np.prod(rule.shape))
        start = int(draw.integers(pool.size - size))
        sink.write(rule.name, pool[start : start + size].reshape(rule.shape))
    sink.close()
    return path


@pytest.mark.parametrize(
    "layers, experts",
    # 0.2 GiB every day, 1.6 GiB every night; the bound is the same.
    [(2, 8), pytest.param(8, 16, marks=pytest.mark.nightly)],
)
def test_peak_memory_does_not_grow_with_the_model(tmp_path, layers, experts):
    config = published.original_config()
    tiny = published.write_directory(tmp_path / "tiny", config, published.tensors(config))
    large = _write(tmp_path / "large", layers, experts)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", MEASURE, str(tiny), str(large), str(out)]
    # A user's process: the tests' simulated devices have threads and memory pools of their own.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    print({name: round(value, 1) for name, value in report.items()})
    assert published_size(out / "large-hf") == published_size(large)
    # A group of tensors is 32 MiB; Orbax holds it up to three times while it writes or reads it.
    assert report["to_orbax"] < 130 and report["back"] < 130, report


LOAD = """
import json, sys
import hybrid_jax
from hybrid_jax import model as models
from hybrid_jax.checkpoint.convert import peak_rss_bytes
tiny, large, scheme = sys.argv[1:4]
hybrid_jax.load(tiny, "bfloat16", quantize=scheme)
before = peak_rss_bytes()
model = hybrid_jax.load(large, "bfloat16", quantize=scheme)
mib = 2.0**-20
print(json.dumps({"peak": (peak_rss_bytes() - before) * mib,
                  "weights": models.size_in_bytes(model) * mib}))
"""


@pytest.mark.parametrize("scheme", ["int8", pytest.param("fp8", marks=pytest.mark.nightly)])
def test_loading_quantised_never_holds_the_weights_unquantised(tmp_path, scheme):
    config = published.original_config()
    tiny = published.write_directory(tmp_path / "tiny", config, published.tensors(config))
    large = _write(tmp_path / "large", 2, 8)
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", LOAD, str(tiny), str(large), scheme]
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["weights"] < 0.55 * published_size(large) * 2.0**-20
    # The experts' largest parameter is a third of all, once more in host memory; a tensor of 4 MiB
    # (8 of the embedding's) in float32 a few times. In bfloat16 the weights alone would be twice.
    assert report["peak"] < 1.34 * report["weights"] + 48, report


def published_size(path) -> int:
    """Bytes of all weights in a directory."""
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in path.glob("*.safetensors")
        for name, entry in _header(file).items()
        if name != "__metadata__"
    )


def _header(file) -> dict:
    with open(file, "rb") as opened:
        return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
