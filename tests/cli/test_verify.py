"""`hybrid-jax verify` names what is damaged, and its exit code says whether anything is."""

import json
import re
import shutil

import numpy as np
import pytest

from hybrid_jax import cli
from hybrid_jax.checkpoint import manifest
from tests.checkpoint.runs import parameters, run_directory, write_step


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 9 and 10 without a run around them: files are all there is to check."""
    for step in ("9", "10"):
        directory = tmp_path / "checkpoints" / step
        directory.mkdir(parents=True)
        (directory / "data").write_bytes(b"x" * 1000)
        manifest.write(directory)
    return tmp_path


def test_good_ones_are_counted(run, capsys):
    for path, count in ((run, 2), (run / "checkpoints", 2), (run / "checkpoints" / "9", 1)):
        assert cli.main(["verify", str(path)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("9: good, 1 files, 0.0 MB read")
        assert said[-1] == f"{count} of {count} good, the newest is {(9, 10)[count - 1]}."


def test_what_is_damaged_is_named(run, capsys, tmp_path):
    (run / "checkpoints" / "10" / "data").write_bytes(b"x" * 999 + b"y")
    (run / "checkpoints" / "11").mkdir()
    # A whole one under another's name would be taken for that step.
    (run / "checkpoints" / "9").rename(run / "checkpoints" / "12")
    report = tmp_path / "report.json"
    assert cli.main(["verify", str(run), "--json", str(report)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("10: BAD.") and "data has other contents" in said[0]
    assert said[1].startswith("11: BAD.") and "did not finish" in said[1]
    assert said[2].startswith("12: BAD.") and "written as 9" in said[2]
    assert said[3] == "0 of 3 good."
    assert [each["problem"] is None for each in json.loads(report.read_text())] == [False] * 3
    # Elsewhere it may be called as its owner likes.
    copy = (run / "checkpoints" / "12").rename(tmp_path / "best")
    assert cli.main(["verify", str(copy)]) == 0
    assert cli.main(["verify", str(run), "--step", "10"]) == 1


def test_parameters_of_a_run_are_held_against_its_config(tmp_path, capsys):
    run = run_directory(tmp_path / "run", steps=(9,))
    assert cli.main(["verify", str(run)]) == 0
    assert "parameters fit the config" in capsys.readouterr().out
    params = parameters()
    first = next(iter(params))
    for spoilt, said in (
        (params | {first: params[first].at[0].set(np.nan)}, rf"'{first}' holds .* NaN"),
        (params | {first: params[first][1:]}, rf"'{first}' has shape"),
        ({name: params[name] for name in list(params)[1:]}, rf"lacks 1 tensors.*'{first}'"),
    ):
        write_step(run, 10, spoilt)
        assert cli.main(["verify", str(run)]) == 1
        out = capsys.readouterr().out
        assert re.search(said, out) and "1 of 2 good, the newest is 9" in out
        shutil.rmtree(run / "checkpoints" / "10")
    assert cli.main(["verify", str(run), "--write-manifest"]) == 2
    assert "of a training run" in capsys.readouterr().err


def test_nothing_to_verify_is_bad_input(run, tmp_path, capsys):
    for arguments, message in (
        ([run, "--step", "7"], r"no checkpoint of step 7; it has [9, 10]"),
        ([tmp_path / "absent"], "is no directory"),
        ([run / "checkpoints" / "9" / "data"], "is no directory"),
    ):
        assert cli.main(["verify", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
