"""`hybrid-jax parity`: its numbers, its exit codes, and what it says of bad input."""

import json

import numpy as np
import pytest

from hybrid_jax.cli import parity
from hybrid_jax.parity import measure, oracles, torch_reference
from hybrid_jax.parity.report import Greedy

# The shapes of test_model.py, so that its compiled programs serve here too.
MINIMAX = {"pattern": "llslls"}
SIZES = {"tokens": 270, "rows": 2, "new_tokens": 64}


def test_a_sound_directory_passes_with_the_public_schema(directory, tmp_path, capsys):
    out = tmp_path / "parity.json"
    path = directory("save_minimax", **MINIMAX)
    assert parity.run(parity.Args(path=path, json=out, **SIZES)) == 0
    report = json.loads(out.read_text())
    assert set(report) == {
        "passed", "logits", "layers", "gradients", "greedy", "reference", "tolerance"
    }  # fmt: skip
    assert set(report["logits"]) == {"max_rel", "mean_rel", "cosine", "top1"}
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{i}" for i in range(6)]
    assert all(set(layer) == {"name", "max_rel", "cosine"} for layer in report["layers"])
    assert report["passed"] is True
    assert report["logits"]["max_rel"] < 1e-5
    assert report["logits"]["top1"] == 1.0
    assert report["gradients"]["max_rel"] < 1e-4
    assert report["greedy"] == {"tokens": 64, "equal": True}
    assert report["tolerance"] == {"logits": 1e-4, "gradients": 1e-3}
    text = capsys.readouterr().out
    assert "decay buffers recomputed" in report["reference"]
    assert "slopes up to" in text
    assert "passed: logits" in text


def test_a_difference_fails_and_is_named(directory, tmp_path, capsys, monkeypatch):
    # The epsilon other implementations use inside lightning attention; large, to be seen at once.
    monkeypatch.setattr(torch_reference, "LIGHTNING_NORM_EPS", 1e-2)
    out = tmp_path / "parity.json"
    path = directory("save_original", pattern="lsls", shared=24)
    assert parity.run(parity.Args(path=path, json=out, **SIZES)) == 1
    report = json.loads(out.read_text())
    assert not report["passed"]
    assert report["logits"]["max_rel"] > 1e-4
    assert "FAILED: logits" in capsys.readouterr().out


def test_where_transformers_rotates_otherwise_the_reference_judges(directory):
    oracle, notes = oracles.choose(directory("save_minimax", rotary_dim=8))
    assert oracle.name.startswith("PyTorch float32 reference")
    assert "rotates 16 of 16 dims of a head; config.json says 8" in notes[0]


def test_decay_buffers_stored_in_bf16_are_recomputed(directory):
    oracle, notes = oracles.choose(directory("save_minimax", pattern="llslls", dtype="bfloat16"))
    assert oracle.name.endswith("decay buffers recomputed by the original formula")
    # bfloat16 keeps 8 bits: up to 2^-9 off, far more than the denominator's 8e-06.
    assert "slopes up to 9.6e-04 off the original formula" in notes[0]


def test_bad_input_is_an_error_before_any_work(directory, tmp_path):
    path = directory("save_original", pattern="ls")
    with pytest.raises(ValueError, match="no directory"):
        parity.run(parity.Args(path=path, json=tmp_path / "absent" / "out.json"))
    with pytest.raises(ValueError, match="cannot be written as a file"):
        parity.run(parity.Args(path=path, json=tmp_path))
    with pytest.raises(ValueError, match="tokens must be at least 3; got 2"):
        parity.run(parity.Args(path=path, tokens=2))
    (tmp_path / "hybrid_jax.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a Hugging Face directory.*convert .* --format"):
        parity.run(parity.Args(path=tmp_path))
    with pytest.raises((ValueError, OSError), match="nowhere"):
        parity.run(parity.Args(path=tmp_path / "nowhere"))


def test_measures_follow_their_definitions():
    found = measure.difference(np.array([1.0, 2.0, -4.5]), np.array([1.0, 2.5, -4.0]))
    assert found.max_rel == pytest.approx(0.5 / 4.0)
    assert found.mean_rel == pytest.approx(1.0 / 7.5)
    assert found.cosine == pytest.approx(24.0 / np.sqrt(25.25 * 23.25))
    assert measure.difference(np.zeros(3), np.zeros(3)) == measure.Difference(0.0, 0.0, 1.0)
    assert measure.difference(np.array([np.nan]), np.array([1.0])).max_rel == measure.FARTHEST
    assert measure.difference(np.array([1e-9]), np.array([0.0])).max_rel == measure.FARTHEST
    assert measure.difference(np.array([1e-9]), np.array([0.0]), floor=1e-3).max_rel < 1e-5


def test_texts_that_part_at_a_tie_are_told_apart_from_wrong_ones():
    assert Greedy(tokens=8, same_tokens=8).equal
    assert not Greedy(tokens=8, same_tokens=3, undecided=True).equal
