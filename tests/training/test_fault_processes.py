"""What goes wrong in one of two processes has the same consequences in both."""

import dataclasses

import numpy as np
import pytest

from hybrid_jax import observe
from hybrid_jax.config import text
from hybrid_jax.config import training as t
from hybrid_jax.config.faults import Faults
from tests.sharding import together
from tests.training import small

pytestmark = pytest.mark.nightly  # two pairs of processes, which compile for minutes


def test_bad_rows_of_one_process_and_a_checkpoint_it_cannot_finish(tmp_path):
    path, logs = tmp_path / "run", tmp_path / "logs"
    config = dataclasses.replace(
        small.small_run(small.write_text(tmp_path), batch_size=8),
        steps=6,
        checkpoints=t.Checkpoints(every=2, keep=2),
        faults=Faults(max_skips_in_a_row=3),
    )
    text.write_yaml(config, tmp_path / "config.yaml")
    command = ["-m", "tests.training.poisoned", "[4, 5]", "[2]", "train", "--out", path]
    started = together.start(2, 1, [*command, "--config", tmp_path / "config.yaml"], logs)
    assert together.wait(started, 500) == [0, 0], together.lines(logs, 0)
    records = observe.read_metrics(path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 0, 0, 0, 1, 1]
    # At the latest after the next save, which waits for this one.
    assert [r["step"] for r in records if r.get("checkpoint_failed") == 2] in ([3], [4], [5])
    assert any("no space left" in line for line in together.lines(logs, 0))
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["4", "6"]
    for process in (0, 1):
        # Each has its own rows, and only one of them the reason.
        with np.load(path / "bad-batches" / f"step-5-process-{process}.npz") as batch:
            assert batch["rows"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]][process]
            assert np.isnan(batch["weights_BT"]).any() == (process == 1)

    # Both know that two in a row were skipped already, though only the first one's file says so.
    command[2:4] = ["[6]", "[]"]
    started = together.start(2, 1, [*command, "--resume", "--steps", "8"], logs)
    assert together.wait(started, 500) == [1, 1], together.lines(logs, 0)
    for process in (0, 1):
        assert any("Step 7: loss nan" in line for line in together.lines(logs, process))
