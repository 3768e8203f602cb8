"""Two real processes train one run: stopped, killed, and continued by one on another mesh."""

import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from hybrid_jax import observe
from hybrid_jax.checkpoint import manifest
from hybrid_jax.config import text
from hybrid_jax.config import training as t
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.training import opening, run
from hybrid_jax.training.stop import START_AGAIN
from tests.sharding import together
from tests.training import small
from tests.training.test_mesh import TOLERANCE, curve
from tests.training.test_resume import MEASURED, assert_same_run

STEPS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Checkpoints so often that one may be half written when the processes are killed.

    Evaluation, which compiles a program of its own, at the end only.
    """
    words = small.write_text(tmp_path_factory.mktemp("text"))
    config = small.small_run(words, model=small.small_model(num_kv_heads=2), batch_size=8)
    return dataclasses.replace(
        config,
        steps=STEPS,
        checkpoints=t.Checkpoints(every=2, keep=2),
        evaluation=t.Evaluation(every=STEPS),
    )


def begun(config, path, logs, *options, count=2, module="hybrid_jax.cli", before=("train",)):
    """Processes of 8 devices together that train `config`; a tensor axis is across two of them."""
    file = path.with_suffix(".yaml")
    text.write_yaml(config, file)
    command = ("-m", module, *before, "--out", path, *options)
    if "--resume" not in options:
        command = (*command, "--config", file)
    # All compile the same programs, the second time too.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(path.with_suffix(".cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return together.start(count, 8 // count, command, logs, cache)


def wait_for_step(path, step: int, started, logs) -> None:
    """Return as soon as the run has done `step` steps; fail with what was printed if it ends."""
    deadline = time.monotonic() + 300
    while len(observe.read_metrics(path / "metrics.jsonl")) < step:
        ended = any(process.poll() is not None for process in started)
        if ended or time.monotonic() > deadline:
            codes = [process.poll() for process in started]
            for process in started:
                process.kill()
            said = [line for p in range(len(started)) for line in together.lines(logs, p)[-15:]]
            pytest.fail("\n".join([f"step {step} was not reached, exit codes {codes}:", *said]))
        time.sleep(0.01)


MESH = ("--mesh", "data=2,tensor=2,fsdp=-1", "--rules", "fsdp_tensor")


def without_times(path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if name not in MEASURED}
        for record in observe.read_metrics(path / "metrics.jsonl")
    ]


def kill_one(started, which: int) -> list[int]:
    """Kill one of two; the exit codes, once the other has noticed."""
    started[which].kill()
    # In the midst of a save it waits for the heartbeat, which takes a minute or more.
    return together.wait(started, 240)


def test_two_processes_are_stopped_and_one_is_killed(config, tmp_path):
    path, logs = tmp_path / "run", tmp_path / "logs"
    small.train(config, tmp_path / "alone", stream=io.StringIO())

    # A signal to the one that does not write ends both after the same step.
    started = begun(config, path, logs, *MESH)
    wait_for_step(path, 1, started, logs)
    started[1].send_signal(signal.SIGTERM)
    # What launchers start again.
    assert together.wait(started, 300) == [START_AGAIN] * 2
    step = len(observe.read_metrics(path / "metrics.jsonl"))
    assert step < STEPS - 4 and (path / "checkpoints" / str(step)).is_dir()
    assert any(f"Stopped by SIGTERM after step {step}" in line for line in together.lines(logs, 0))
    assert together.lines(logs, 1) == []

    started = begun(config, path, logs, "--resume")
    wait_for_step(path, step + 2, started, logs)
    codes = kill_one(started, 1)
    assert codes[1] == -9 and codes[0] not in (0, -9), codes
    before = without_times(path)
    assert step + 2 <= len(before) < STEPS

    assert together.wait(begun(config, path, logs, "--resume"), 300) == [0, 0]
    # The steps since the last checkpoint were done twice, to the same bits.
    assert without_times(path)[: len(before)] == before
    assert [record["step"] for record in without_times(path)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(curve(path), curve(tmp_path / "alone"), rtol=TOLERANCE)


@pytest.mark.nightly
def test_one_of_two_processes_killed_five_times_the_run_ends_with_the_same_bits(config, tmp_path):
    config = dataclasses.replace(
        config,
        steps=60,
        checkpoints=t.Checkpoints(every=1, keep=2),
        evaluation=t.Evaluation(every=60),
    )
    whole, path, logs = tmp_path / "whole", tmp_path / "run", tmp_path / "logs"
    assert together.wait(begun(config, whole, logs, *MESH), 900) == [0, 0]
    shutil.copytree(whole.with_suffix(".cache"), path.with_suffix(".cache"))
    chosen = random.Random(5)
    for number in range(5):
        options = ("--resume",) if number else MESH
        seen = len(observe.read_metrics(path / "metrics.jsonl")) if number else 0
        started = begun(config, path, logs, *options)
        wait_for_step(path, seen + chosen.randint(2, 8), started, logs)
        time.sleep(chosen.uniform(0, 0.2))
        which = number % 2
        codes = kill_one(started, which)
        assert codes[which] == -9 and codes[1 - which] != 0, codes
    assert len(without_times(path)) < 60
    assert together.wait(begun(config, path, logs, "--resume"), 900) == [0, 0]
    assert_same_run(config, path, whole)


@pytest.mark.nightly
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_batches(first, then, config, tmp_path):
    """The next 50, and the loss of each."""
    steps = 60
    config = dataclasses.replace(
        config,
        steps=steps,
        checkpoints=t.Checkpoints(every=2, keep=2),
        evaluation=t.Evaluation(every=steps),
        parallel=Parallel(mesh="fsdp=8"),
    )
    path, whole, logs = tmp_path / "run", tmp_path / "whole", tmp_path / "logs"

    def train(out, count, *options):
        watched = {"module": "tests.training.watched", "before": (f"{out}.rows-{count}",)}
        return begun(config, out, logs, *options, count=count, **watched)

    assert together.wait(train(whole, first), 900) == [0] * first
    started = train(path, first)
    wait_for_step(path, 3, started, logs)
    started[0].send_signal(signal.SIGTERM)
    assert together.wait(started, 900) == [START_AGAIN] * first
    step = len(without_times(path))
    assert 3 <= step <= steps - 50
    assert together.wait(train(path, then, "--resume"), 900) == [0] * then

    wanted, got = rows_fed(f"{whole}.rows-{first}", first), rows_fed(f"{path}.rows-{then}", then)
    assert all(sorted(map(int, batch)) == list(range(8)) for batch in wanted[:steps])
    assert got[: steps - step] == wanted[step:steps] and steps - step >= 50
    np.testing.assert_allclose(curve(path), curve(whole), rtol=TOLERANCE)


def rows_fed(log: str, count: int) -> list[dict]:
    """{row: hash} of each batch, from all processes."""
    lines = [pathlib.Path(f"{log}.{process}").read_text().splitlines() for process in range(count)]
    return [
        {row: said for line in batch for row, said in json.loads(line).items()}
        for batch in zip(*lines, strict=True)
    ]


def test_a_process_that_means_another_run_is_told_so(tmp_path, monkeypatch):
    """As the processes after the first check it."""
    monkeypatch.setattr(opening, "_SECONDS_TO_APPEAR", 0)
    config, path = small.small_run(small.write_text(tmp_path)), tmp_path / "run"
    facts = {"config": opening._digest(config), "holder": "process 7 on elsewhere"}
    with pytest.raises(ValueError, match="on a file system that all processes share"):
        opening._check_same(config, run.RunDirectory(path), facts)
    with run.begin(config, path) as begun_run:
        with pytest.raises(ValueError, match="is not the directory that process 0 holds"):
            opening._check_same(config, begun_run, facts)
        facts["holder"] = f"process {os.getpid()} on {socket.gethostname()}"
        opening._check_same(config, begun_run, facts)
        other = dataclasses.replace(config, batch_size=8)
        with pytest.raises(ValueError, match="another configuration than process 0"):
            opening._check_same(other, begun_run, facts)


def test_a_process_reads_the_rows_of_its_devices_and_no_others(tmp_path):
    started = together.start(2, 2, ["-m", "tests.training.feeding"], tmp_path)
    assert together.wait(started, 120) == [0, 0], together.lines(tmp_path, 0)
    # Rows along fsdp are the first or the second half; along sequence all rows, in parts; with
    # tensor across the processes both hold everything.
    assert together.lines(tmp_path, 0) == ["0123", "01234567", "01234567"]
    assert together.lines(tmp_path, 1) == ["4567", "01234567", "01234567"]


def test_two_processes_share_the_files_and_what_they_find(tmp_path):
    started = together.start(2, 2, ["-m", "tests.training.sharing", tmp_path / "c"], tmp_path)
    codes = together.wait(started, 240)
    said = [together.lines(tmp_path, process) for process in (0, 1)]
    assert codes == [0, 0], said
    # The newest; and the one before it, when one of the two has found a bit that flipped.
    assert said[0][1:] == said[1][1:] == ["{'batches': 2}", "{'batches': 1}"]
    assert said[0][0] == "['1', '2']"
    manifest.verify(tmp_path / "c" / "1")
