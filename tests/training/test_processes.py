"""Two real processes train one run: stopped, killed, and continued by one on another mesh."""

import dataclasses
import io
import os
import signal
import socket
import time

import numpy as np
import pytest

from hybrid_jax import observe, training
from hybrid_jax.config import text
from hybrid_jax.config import training as t
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.training import opening, run
from tests.sharding import together
from tests.training import small
from tests.training.test_mesh import TOLERANCE, curve

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


def begun(config, path, logs, *options):
    """Two processes of four devices each that train `config`, a tensor axis across them."""
    file = path.with_suffix(".yaml")
    text.write_yaml(config, file)
    mesh = ("--mesh", "data=2,tensor=2,fsdp=-1", "--rules", "fsdp_tensor")
    command = ("-m", "hybrid_jax.cli", "train", "--out", path, *mesh, *options)
    if "--resume" not in options:
        command = (*command, "--config", file)
    # Both compile the same programs, the second time too.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(path.with_suffix(".cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return together.start(2, 4, command, logs, cache)


def wait_for_step(path, step: int, started, logs) -> None:
    """Return as soon as the run has done `step` steps; fail with what was printed if it ends."""
    deadline = time.monotonic() + 300
    while len(observe.read_metrics(path / "metrics.jsonl")) < step:
        ended = [process.poll() for process in started] != [None, None]
        if ended or time.monotonic() > deadline:
            codes = [process.poll() for process in started]
            for process in started:
                process.kill()
            said = [line for p in (0, 1) for line in together.lines(logs, p)[-15:]]
            pytest.fail("\n".join([f"step {step} was not reached, exit codes {codes}:", *said]))
        time.sleep(0.01)


def test_two_processes_stop_die_and_are_continued_by_one(config, tmp_path):
    path, logs = tmp_path / "run", tmp_path / "logs"
    small.train(config, tmp_path / "alone", stream=io.StringIO())

    # A signal to the one that does not write ends both after the same step.
    started = begun(config, path, logs)
    wait_for_step(path, 1, started, logs)
    started[1].send_signal(signal.SIGTERM)
    # What launchers start again.
    assert together.wait(started, 300) == [75, 75]
    step = len(observe.read_metrics(path / "metrics.jsonl"))
    assert step < STEPS - 4 and (path / "checkpoints" / str(step)).is_dir()
    assert any(f"Stopped by SIGTERM after step {step}" in line for line in together.lines(logs, 0))
    assert together.lines(logs, 1) == []

    started = begun(config, path, logs, "--resume")
    wait_for_step(path, step + 2, started, logs)
    for process in started:
        process.kill()
    assert together.wait(started, 60) == [-9, -9]
    assert step + 2 <= len(observe.read_metrics(path / "metrics.jsonl")) <= STEPS

    other = dataclasses.replace(config, parallel=Parallel(mesh="fsdp=8"))
    outcome = training.train(other, path, resume=True, stream=io.StringIO())
    assert outcome.step == STEPS
    np.testing.assert_allclose(curve(path), curve(tmp_path / "alone"), rtol=TOLERANCE)


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
