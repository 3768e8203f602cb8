"""The evidence runs: same data for every model, finished runs kept, and everything drawn."""

import json
import sys

import numpy as np
import pytest

from scripts import evidence


def test_models_differ_in_their_mixers_only():
    configs = {name: evidence.model_config(name) for name in evidence.VARIANTS}
    kinds = {
        name: "".join(type(layer.mixer).__name__[0] for layer in config.layers)
        for name, config in configs.items()
    }
    assert kinds == evidence.VARIANTS
    assert all(config.shift_embeddings for config in configs.values())


def test_the_batch_of_a_step_is_always_the_same():
    one, again = evidence.batch(0, 3, 4, 80), evidence.batch(0, 3, 4, 80)
    np.testing.assert_array_equal(one.tokens_BT, again.tokens_BT)
    other = evidence.batch(0, 4, 4, 80)
    assert (one.tokens_BT != other.tokens_BT).any()
    # Questions begin where the pairs of the row end.
    first = (one.weights_BT > 0).argmax(axis=1)
    assert set(first.tolist()) <= {2 * pairs for pairs in evidence.PAIRS}


@pytest.mark.nightly
def test_finished_runs_are_kept_and_everything_is_drawn(tmp_path, monkeypatch, capsys):
    # One variant: the others compile programs of their own.
    monkeypatch.setattr(evidence, "VARIANTS", {"softmax": "SS"})
    options = ["--steps", "2", "--seeds", "2", "--rows", "1", "--stretch", "1", "--out"]
    options += [str(tmp_path), "--batch-size", "2", "--length", "80", "--timed-lengths", "80"]
    monkeypatch.setattr(sys, "argv", ["evidence", *options])
    assert evidence.main() == 0
    found = json.loads((tmp_path / "summary.json").read_text())["softmax"]
    runs = [json.loads((tmp_path / f"softmax-{seed}.json").read_text()) for seed in range(2)]
    wanted = sorted(run["pairs"][-1]["recall"] for run in runs)
    assert found["recall_by_pairs"]["32"] == [wanted[0], np.mean(wanted), wanted[1]]
    assert len(runs[0]["losses"]) == 2 and runs[0]["losses"] != runs[1]["losses"]
    for name in ("recall", "loss", "length", "speed"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    before = (tmp_path / "softmax-0.json").stat().st_mtime_ns
    (tmp_path / "softmax-1.json").unlink()
    assert evidence.main() == 0
    assert (tmp_path / "softmax-0.json").stat().st_mtime_ns == before
    assert "softmax-0.json is there; not run again" in capsys.readouterr().out
    again = json.loads((tmp_path / "softmax-1.json").read_text())
    assert again["losses"] == runs[1]["losses"]
