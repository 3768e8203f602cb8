"""The tiny context extension: documents that ask for what they hold, and stages in their order."""

import json
import sys

import numpy as np
import pytest

from scripts import evidence, extension


@pytest.mark.parametrize(("shortest", "longest"), [(24, 63), (257, 400)])
def test_what_is_learned_was_said_before_behind_its_key(shortest, longest):
    made = list(extension.documents(shortest, longest, 20, 5))
    again = list(extension.documents(shortest, longest, 15, 10))
    for one, other in zip(made[5:], again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    for document in made:
        ids, learned = document.ids, document.learned
        assert shortest - 1 <= len(ids) <= longest and ids.max() < evidence.VOCAB
        places = np.flatnonzero(learned)
        assert len(places) >= 4 and np.all(ids[places] >= evidence.VOCAB // 2)
        for place in places:
            said = np.flatnonzero(ids[: place - 1] == ids[place - 1])
            assert ids[said[0] + 1] == ids[place]


@pytest.mark.nightly
def test_every_stage_starts_from_the_one_before(tmp_path, monkeypatch, capsys):
    options = ["--out", str(tmp_path), "--base-steps", "2", "--stage-tokens", "9000"]
    monkeypatch.setattr(sys, "argv", ["extension", *options, "--samples", "1"])
    monkeypatch.setattr(extension, "LENGTHS", (128,))
    assert extension.main() == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["maps"]) == ["before", *(f"after {name}" for name, _ in extension.STAGES)]
    before = tmp_path / "base"
    for name, _ in extension.STAGES:
        origin = json.loads((tmp_path / name / "start.json").read_text())
        assert str(before) in json.dumps(origin)
        before = tmp_path / name
    assert (tmp_path / "needles.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert extension.main() == 0
    assert "Compiling" not in capsys.readouterr().out
