"""A run that was interrupted, however rudely, ends with the same bits as one that was not."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hybrid_jax import data, observe, training
from hybrid_jax.config import text
from hybrid_jax.config import training as t
from hybrid_jax.config.data import Source
from hybrid_jax.config.faults import Faults
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import abstract_state
from tests.sharding import together
from tests.training import small

pytestmark = pytest.mark.usefixtures("compiled_once")
MEASURED = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small.small_run(small.write_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The directory of a run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    outcome = small.train(config, path, stream=io.StringIO())
    assert outcome.step == 8 and outcome.stopped_by is None
    return path


def everything(config, path):
    """(arrays of the newest checkpoint, position, metrics without what is measured)."""
    skeleton = Skeleton(config.model)
    abstract = abstract_state(skeleton, Optimizer(config, skeleton.axes))
    with CheckpointStore.reading(path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(abstract)
    records = [
        {name: value for name, value in record.items() if name not in MEASURED}
        for record in observe.read_metrics(path / "metrics.jsonl")
    ]
    return jax.tree.map(np.asarray, restored.state), restored.position, records


def bits(state) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest()
        for path, leaf in leaves
    }


def assert_same_run(config, path, whole):
    state, position, records = everything(config, path)
    wanted_state, wanted_position, wanted_records = everything(config, whole)
    # Bits, which tell 0 from -0.
    assert bits(state) == bits(wanted_state)
    assert position == wanted_position and position["batches"] == config.steps
    assert [record["step"] for record in records] == list(range(1, config.steps + 1))
    assert records == wanted_records


def test_a_run_leaves_what_it_promises(config, whole):
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "tokenizer.json"):
        assert (whole / name).stat().st_size > 0
    # Every 3 steps and the last, the newest two kept.
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["6", "8"]
    records = observe.read_metrics(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [r["step"] for r in records if "heldout_loss" in r] == [4, 8]
    assert text.read_yaml(type(config), whole / "config.yaml") == config
    model = training.restore_model(whole)
    state, _, _ = everything(config, whole)
    np.testing.assert_array_equal(model.embedding.table[...], state.params["embedding.table"])
    first = training.restore_model(whole, step=6)
    assert (np.asarray(first.embedding.table[...]) != state.params["embedding.table"]).any()
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; it has \[6, 8\]"):
        training.restore_model(whole, step=7)


def test_a_signal_saves_and_a_resume_continues_exactly(config, whole, tmp_path):
    path = tmp_path / "run"
    # The first step's line is printed, then the signal: the second step is never begun.
    outcome = small.train(config, path, stream=small.Interrupting("step 1/8", signal.SIGINT))
    assert outcome.step == 1 and outcome.stopped_by == "SIGINT"
    assert outcome.heldout_loss is None
    # Again, before the resumed run took a step: nothing to save, nothing lost.
    stream = small.Interrupting("Resuming", signal.SIGTERM)
    outcome = small.train(config, path, resume=True, stream=stream)
    assert outcome.step == 1 and outcome.stopped_by == "SIGTERM"
    outcome = small.train(config, path, resume=True, stream=io.StringIO())
    assert outcome.step == 8
    assert_same_run(config, path, whole)


def test_kill_dash_nine_and_a_torn_metrics_file_lose_nothing(
    config, whole, tmp_path, compiled_once
):
    path, options = tmp_path / "run", tmp_path / "config.yaml"
    text.write_yaml(config, options)
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid_jax.cli", "train", "--config", options, "--out", path],
        # One device there, as here.
        env=os.environ | compiled_once | {"XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
    )
    # Long, for a machine that others use too; on an idle one it takes 10 s.
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if len(observe.read_metrics(path / "metrics.jsonl")) >= 4:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 4 <= len(observe.read_metrics(path / "metrics.jsonl")) <= 8
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    # Of a checkpoint that was being written, Orbax leaves a directory under another name.
    (path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True, exist_ok=True)
    small.train(config, path, resume=True, stream=io.StringIO())
    assert_same_run(config, path, whole)
    assert not (path / "checkpoints" / "7.orbax-checkpoint-tmp").exists()


def killed_and_resumed(config, path, kills: int, environment) -> list:
    """How each of `kills` + 1 starts of a run was to be killed, and its exit code."""
    options = path.with_suffix(".yaml")
    text.write_yaml(config, options)
    command = [sys.executable, "-m", "tests.training.dying", "runs", options, path, "1", str(kills)]
    ended = subprocess.run(
        command,
        env=os.environ | environment | {"XLA_FLAGS": "", "PYTHONPATH": str(together.ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(ended.stdout)


def test_killed_five_times_in_its_saves_a_run_ends_with_the_same_bits(
    config, whole, tmp_path, compiled_once
):
    path = tmp_path / "run"
    often = dataclasses.replace(config, checkpoints=t.Checkpoints(every=1, keep=2))
    ends = killed_and_resumed(often, path, 5, compiled_once)
    assert [code for _, code in ends] == [-9] * 5 + [0], ends
    assert_same_run(config, path, whole)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["7", "8"]


@pytest.mark.nightly
def test_killed_fifty_times_a_run_ends_with_the_same_bits(config, tmp_path, compiled_once):
    often = dataclasses.replace(
        config,
        steps=120,
        checkpoints=t.Checkpoints(every=1, keep=2),
        evaluation=t.Evaluation(every=120),
    )
    small.train(often, tmp_path / "whole", stream=io.StringIO())
    ends = killed_and_resumed(often, tmp_path / "run", 50, compiled_once)
    assert [code for _, code in ends] == [-9] * 50 + [0], ends
    assert_same_run(often, tmp_path / "run", tmp_path / "whole")


def test_more_steps_are_allowed_and_anything_else_is_named(config, whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    before = (path / "config.yaml").read_bytes()
    other = text.from_dict(type(config), text.to_dict(config) | {"batch_size": 2, "seed": 7})
    with pytest.raises(ValueError, match=r"batch_size = 4  \(now: 2\)\n  seed = 0  \(now: 7\)"):
        small.train(other, path, resume=True)
    fewer = text.from_dict(type(config), text.to_dict(config) | {"steps": 5})
    with pytest.raises(ValueError, match=r"steps=5, but .* has already done 8"):
        small.train(fewer, path, resume=True, stream=io.StringIO())
    assert (path / "config.yaml").read_bytes() == before
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*--out"):
        small.train(config, path)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        small.train(config, tmp_path / "absent", resume=True)


def test_a_loss_that_is_no_number_stops_the_run(config, whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    shutil.rmtree(path / "checkpoints" / "8")
    skeleton = Skeleton(config.model)
    abstract = abstract_state(skeleton, Optimizer(config, skeleton.axes))
    with CheckpointStore(path / "checkpoints", keep=2) as checkpoints:
        state, position, fingerprint = checkpoints.restore(abstract)
        state.params["norm.scale"] = state.params["norm.scale"] * np.float32("nan")
        checkpoints.save(7, state, position, fingerprint)
    # What is to happen on faults may change; the run is the same.
    strict = dataclasses.replace(config, faults=Faults(max_skips_in_a_row=1))
    words = r"Step 8: loss nan.*batches is .*/step-8\.npz; the newest checkpoint is .*/7\."
    with pytest.raises(training.Diverged, match=words):
        small.train(strict, path, resume=True, stream=io.StringIO())
    assert [p.name for p in sorted((path / "checkpoints").iterdir())] == ["6", "7"]


def test_a_full_disk_is_one_sentence_and_spares_older_checkpoints(config, whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    skeleton = Skeleton(config.model)
    abstract = abstract_state(skeleton, Optimizer(config, skeleton.axes))
    absl, limits = logging.getLogger("absl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    absl.setLevel(logging.CRITICAL)
    with CheckpointStore(path / "checkpoints", keep=2) as checkpoints:
        state, position, fingerprint = checkpoints.restore(abstract)
        # No file may grow beyond this; what a full disk says, without filling one.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"could not be written .*make room"):
                checkpoints.save(9, state, position, fingerprint)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            absl.setLevel(logging.NOTSET)
    assert everything(config, path)[1]["batches"] == 8


def test_a_missing_text_leaves_no_directory_behind(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        small.train(small.small_run(tmp_path / "none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_data_than_the_checkpoint_was_made_with_is_refused(config, whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    tokens = path / "tokens" / "00"
    ids = np.load(tokens / "shards" / "00000.ids.npy")
    ids[5] += 1
    np.save(tokens / "shards" / "00000.ids.npy", ids)
    with pytest.raises(ValueError, match=r"00000 is damaged \(checksum\). Delete .*tokenise again"):
        small.train(config, path, resume=True, stream=io.StringIO())
    # Whole and sound, but of another text.
    shutil.rmtree(tokens)
    (tmp_path / "other").mkdir()
    small.write_text(tmp_path / "other", documents=11)
    tokenizer = data.Tokenizer.load(path / "tokenizer.json")
    data.prepare(Source(path=str(tmp_path / "other")), tokens, tokenizer)
    with pytest.raises(ValueError, match="belongs to other data"):
        small.train(config, path, resume=True, stream=io.StringIO())
