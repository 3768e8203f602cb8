"""`bench model`: what it counts, when it refuses to time, and the whole run on a small model."""

import json

import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.bench import model, tasks
from hybrid_jax.config import presets
from hybrid_jax.model import traffic


def test_decode_reads_each_weight_once_and_only_the_experts_that_are_visited():
    config = presets.get("quickstart")
    D, W, F, E = 256, 8192, 512, 8
    lightning = D * 5 * 256 + 256 + 2 * D
    softmax = D * (256 + 128 + 128 + 256) + 2 * D
    router = D * E
    dense = 7 * lightning + softmax + 8 * router + D + D * W
    # One row visits two experts in each layer.
    weights = dense + 8 * 2 * 3 * D * F
    memories = 7 * 2 * 4 * 64 * 64
    cache = 2 * 2 * 64 * 512
    assert traffic.decode_bytes(config, 1, 512) == 4 * (weights + memories + cache)
    # Many rows visit all.
    many = traffic.decode_bytes(config, 1000, 0) - 1000 * 4 * memories
    assert many == pytest.approx(4 * (dense + 8 * E * 3 * D * F))


def test_nothing_is_timed_where_the_two_sides_differ():
    logits = np.linspace(-1, 1, 8)[None]
    model._compare("prefill_1k", logits + 1e-6, logits)
    with pytest.raises(model.Mismatch, match="prefill_1k"):
        model._compare("prefill_1k", logits + 0.1, logits)
    tokens = np.array([[3, 4], [5, 6]])
    model._compare("decode_b8", tokens, np.array([[3, 0], [5, 0]]))
    with pytest.raises(model.Mismatch, match="greedy"):
        model._compare("decode_b8", tokens, np.array([[3, 4], [0, 6]]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--json", "/no/such/directory/out.json"], "no directory"),
        (["--preset", "quickstrat"], "quickstart"),
    ],
)
def test_bad_input_ends_with_two_and_says_why(options, words, capsys):
    assert cli.main(["bench", "model", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.nightly
def test_a_whole_run_on_a_small_model(tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "bench.json"
    options = ["--preset", "nano", "--rounds", "1", "--json", str(out)]
    assert cli.main(["bench", "model", *options]) == 0
    report = json.loads(out.read_text())
    assert set(report["ratio"]) == set(tasks.NAMES)
    assert all(value > 0 for value in report["ratio"].values())
    assert report["matmul_gflops"] > 0 and report["memory_gigabytes"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in tasks.NAMES)
