"""Bad updates leave no trace, runs go on or end as told, and a resume knows what had happened."""

import dataclasses
import io
import json
import math
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import observe, training
from hybrid_jax.checkpoint import manifest
from hybrid_jax.config import training as t
from hybrid_jax.config.faults import Faults, Spikes
from hybrid_jax.data import Batches
from hybrid_jax.training import bad_batches
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.guard import Limits
from hybrid_jax.training.history import History
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import TrainState, initial_state
from hybrid_jax.training.step import make_train_step
from hybrid_jax.training.supply import Supplied
from tests.training import small
from tests.training.test_resume import assert_same_run, everything

pytestmark = pytest.mark.usefixtures("compiled_once")
INFINITE = np.float32(np.inf)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small.small_run(small.write_text(tmp_path_factory.mktemp("text")))


def poison(monkeypatch, positions, values=math.nan):
    """From now on the batches at these positions have weights that are no numbers."""
    honest = Batches.__next__

    def poisoned(self):
        number, batch = self.position["batches"], honest(self)
        if number in positions:
            # One target of one row: its NaN is in every element that is summed over tokens.
            batch.weights_BT[1, 3] = values
        return batch

    monkeypatch.setattr(Batches, "__next__", poisoned)


def run(config, path, **options):
    stream = options.pop("stream", io.StringIO())
    outcome = small.train(config, path, stream=stream, **options)
    return outcome, stream.getvalue()


def test_an_update_that_is_not_sound_changes_no_bit_but_the_count():
    config = small.small_run(schedule=t.Schedule(warmup_steps=0, decay=t.Constant()))
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    step = make_train_step(config, skeleton, optimizer)
    good, other = (small.random_batch(4, 32, seed) for seed in (0, 1))
    weights = good.weights_BT.copy()
    weights[2, 7] = np.nan
    no_number = good._replace(weights_BT=weights)

    def after(*batches):
        state, skipped = initial_state(config, skeleton, optimizer), []
        for batch, *limits in batches:
            state, metrics = step(state, batch, Limits(*limits))
            skipped.append(int(metrics["skipped"]))
            assert (metrics["update_norm"] == 0) == bool(skipped[-1])
        return jax.tree.map(np.asarray, state), skipped

    free = INFINITE, INFINITE
    wanted, _ = after((good, *free), (other, *free))
    bad = (no_number, *free), (other, np.float32(1), INFINITE), (other, INFINITE, np.float32(1e-3))
    found, skipped = after((good, *free), *bad, (other, *free))
    assert skipped == [0, 1, 1, 1, 0] and found.step == 5
    jax.tree.map(
        np.testing.assert_array_equal,
        (found.params, found.optimizer),
        (wanted.params, wanted.optimizer),
    )


@pytest.fixture
def spiky(config):
    """Skips an update a little above the four before it, too, and goes back after two in a row."""
    spikes = Spikes(window=4, sigmas=1.0, rewind_after=2, max_rewinds=1)
    return dataclasses.replace(config, faults=Faults(spikes=spikes))


# Before the first, which leaves a checkpoint that a whole run has not; and after going back.
@pytest.mark.parametrize("interrupted_after", [4, pytest.param(6, marks=pytest.mark.nightly)])
def test_a_run_interrupted_among_bad_updates_ends_with_the_bits_of_one_that_was_not(
    interrupted_after, spiky, tmp_path, monkeypatch
):
    # Steps 5 and 6: skipped, then back to the checkpoint of step 3.
    poison(monkeypatch, {4, 5})
    outcome, said = run(spiky, tmp_path / "whole")
    assert outcome.step == 8
    assert "go back to those of step 3; data and steps go on" in said and "Step 5: loss nan" in said
    records = everything(spiky, tmp_path / "whole")[2]
    assert [r["step"] for r in records if r["loss"] is None] == [5, 6]
    assert [r.get("rewound_to") for r in records[4:]] == [None, 3, None, None]
    assert [r["skipped"] for r in records[4:6]] == [1, 1]

    path = tmp_path / "run"
    stream = small.Interrupting(f"step {interrupted_after}/8", signal.SIGINT)
    monkeypatch.setattr(observe.progress, "_SECONDS_BETWEEN_LINES", 0)
    outcome, _ = run(spiky, path, stream=stream)
    assert outcome.step == interrupted_after
    run(spiky, path, resume=True)
    assert_same_run(spiky, path, tmp_path / "whole")


def test_going_back_restores_the_checkpoint_before_the_first_bad_update(
    spiky, tmp_path, monkeypatch
):
    poison(monkeypatch, {4, 5})
    before, after = (dataclasses.replace(spiky, steps=steps) for steps in (3, 6))
    # The learning rate depends on how many steps there will be.
    constant = t.Schedule(warmup_steps=0, decay=t.Constant())
    before, after = (dataclasses.replace(each, schedule=constant) for each in (before, after))
    run(before, tmp_path / "before")
    run(after, tmp_path / "after")
    at_3, _, _ = everything(before, tmp_path / "before")
    at_6, position, _ = everything(after, tmp_path / "after")
    assert at_6.step == 6 == position["batches"]
    jax.tree.map(np.testing.assert_array_equal, at_6.params, at_3.params)
    jax.tree.map(np.testing.assert_array_equal, at_6.optimizer, at_3.optimizer)


def test_too_many_in_a_row_end_the_run_though_it_was_resumed_among_them(
    config, tmp_path, monkeypatch
):
    poison(monkeypatch, {1, 3, 4, 5})
    strict = dataclasses.replace(config, faults=Faults(max_skips_in_a_row=3))
    path = tmp_path / "run"
    monkeypatch.setattr(observe.progress, "_SECONDS_BETWEEN_LINES", 0)
    run(strict, path, stream=small.Interrupting("step 5/8", signal.SIGINT))
    words = r"Step 6: loss nan.*3 updates in a row were .*is .*/bad-batches/step-6\.npz; .*/5\."
    with pytest.raises(training.Diverged, match=words):
        run(strict, path, resume=True)
    # The record of the last step is there too, for whoever looks.
    assert [r["step"] for r in observe.read_metrics(path / "metrics.jsonl") if r["skipped"]] == [
        *(2, 4, 5, 6)
    ]
    with np.load(path / "bad-batches" / "step-5.npz") as batch:
        # Where the data goes on after it.
        assert json.loads(str(batch["position"]))["batches"] == 5
        assert batch["rows"].tolist() == [0, 1, 2, 3]
        assert np.argwhere(np.isnan(batch["weights_BT"])).tolist() == [[1, 3]]
        assert batch["tokens_BT"].shape == (4, 32)


def test_limits_follow_the_window_and_a_stored_history_gives_the_same_bits():
    faults = Faults(spikes=Spikes(window=4, sigmas=2.0))
    history = History(faults)
    records = [
        {"step": s, "loss": loss, "gradient_norm": 1 / 3 + s / 7, "skipped": 0.0}
        for s, loss in enumerate((9.0, 1.0, 2.0, math.nan, 3.0, 6.0))
    ]
    for record in records[:1]:
        history.add(record)
    # Half the window must be known first.
    assert history.limits().loss == np.inf
    for record in records[1:]:
        history.add(record)
    history.add({"step": 6, "loss": None, "gradient_norm": None, "skipped": 1.0})
    assert (history.skipped_in_a_row, history.skipped) == (1, 1)
    # 1, 2, 3 and 6: mean 3, standard deviation sqrt(14 / 3) of the sample.
    assert history.limits().loss == np.float32(3 + 2 * math.sqrt(14 / 3))
    other = History(faults)
    other.load(history.to_json())
    assert other.limits() == history.limits() and other.to_json() == history.to_json()
    assert not history.wants_rewind
    assert History(Faults()).limits() == (np.inf, np.inf)


def test_faults_that_contradict_one_another_are_refused():
    with pytest.raises(ValueError, match=r"rewind_after=20 is never reached"):
        Faults(spikes=Spikes(rewind_after=20))
    with pytest.raises(ValueError, match=r"hang_seconds must be > 0; got 0"):
        Faults(hang_seconds=0)
    with pytest.raises(ValueError, match=r"window must be >= 4; got 1"):
        Spikes(window=1)


def test_the_newest_bad_batches_are_kept(tmp_path):
    batch = small.random_batch(1, 4)
    supplied = Supplied(batch, batch, [0], {"batches": 1})
    for step in range(95, 95 + bad_batches.KEEP + 2):
        bad_batches.write(tmp_path / "bad", step, supplied)
    kept = sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "bad").iterdir())
    assert kept == list(range(97, 97 + bad_batches.KEEP))


def failing_manifests(monkeypatch, steps):
    """Checkpoints of these steps cannot be finished."""
    honest = manifest.write

    def write(path, *arguments):
        if int(path.name) in steps:
            raise OSError("no space left")
        return honest(path, *arguments)

    monkeypatch.setattr(manifest, "write", write)


def test_a_checkpoint_that_cannot_be_written_is_said_and_training_goes_on(
    config, tmp_path, monkeypatch
):
    failing_manifests(monkeypatch, {3})
    path = tmp_path / "run"
    outcome, said = run(config, path)
    assert outcome.step == 8 and "no space left" in said and "Training goes on" in said
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["6", "8"]
    failed = {
        r["step"]: r["checkpoint_failed"]
        for r in observe.read_metrics(path / "metrics.jsonl")
        if "checkpoint_failed" in r
    }
    # As soon as it is known, at the latest when the next one begins.
    [(step, what)] = failed.items()
    assert what == 3 and 4 <= step <= 7


def test_what_a_failed_save_has_left_makes_room_for_the_next(tmp_path):
    draft = tmp_path / "3.orbax-checkpoint-tmp" / "params"
    state = TrainState(jnp.int32(6), {"a": jnp.ones(3)}, {"m": jnp.zeros(3)})
    with CheckpointStore(tmp_path, keep=2) as checkpoints:
        draft.mkdir(parents=True)
        checkpoints.save(6, state, {}, "data")
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_last_state_that_is_lost_is_an_error(config, tmp_path, monkeypatch):
    failing_manifests(monkeypatch, {8})
    with pytest.raises(OSError, match=r"newest state is lost.*no space left.*--resume"):
        run(config, tmp_path / "run")
    assert manifest.read(tmp_path / "run" / "checkpoints" / "6")
    monkeypatch.undo()
    outcome, said = run(config, tmp_path / "run", resume=True)
    assert outcome.step == 8 and "Resuming at step 6" in said


HANG = """
import pathlib, sys, time
from hybrid_jax.training.watchdog import Watchdog
def stuck():
    time.sleep(60)
with Watchdog(1.5, 3.0, pathlib.Path(sys.argv[1])) as watchdog:
    watchdog.slow("compiling")
    time.sleep(2)
    for _ in range(4):
        watchdog.alive()
        time.sleep(0.7)
    print("alive", flush=True)
    watchdog.alive("a step")
    stuck()
"""


def test_a_hang_ends_with_75_and_says_where(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", HANG, tmp_path], capture_output=True, text=True, timeout=50
    )
    assert result.returncode == 75 and result.stdout == "alive\n"
    for said in (result.stderr, (tmp_path / "hang-0.txt").read_text()):
        assert "hang: a step has not ended in time in process 0" in said
        assert "in stuck" in said and "--faults.hang-seconds" in said
