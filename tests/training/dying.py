"""Processes killed at a chosen moment of a save: `python -m tests.training.dying CASE ...`.

Each is forked from one that has imported everything and has not begun to compute.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import threading
import time

import numpy as np

from hybrid_jax import cli
from hybrid_jax.checkpoint import faults
from hybrid_jax.cli import train as _train  # noqa: F401  (imported before the fork)
from hybrid_jax.training.checkpoints import CheckpointStore
from hybrid_jax.training.state import TrainState


def state(seed: int, megabytes: float = 1.0) -> TrainState:
    """Incompressible weights: a compressor's own checks must not be what finds damage."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(seed)
    rows = int(megabytes * 1e6) // 4 // 1024
    params = {
        "a.scale": rng.standard_normal((rows, 512), np.float32),
        "b.scale": rng.standard_normal((rows, 256), np.float32).astype(jnp.bfloat16),
    }
    moments = {"a.scale": rng.standard_normal((rows, 384), np.float32)}
    optimizer = {"count": np.int32(seed), "moments": moments}
    return jax.tree.map(jnp.asarray, TrainState(np.int32(seed), params, optimizer))


def kill_at(point: str | None, count: int = 1, seconds: float = 0.0, drafts=None) -> None:
    """Let this process die when `point` is reached the `count`th time, or some time after.

    None is the start.
    Within "arrays", only when a file lies in one of `drafts`.
    """
    if point is None:
        threading.Timer(seconds, _die).start()
    left = count

    def hook(reached: str) -> None:
        nonlocal left
        left -= reached == point
        if left or reached != point:
            return
        if seconds:
            threading.Timer(seconds, _die).start()
            return
        if point == "deletion":
            _die_while_deleting()
            return
        if drafts is not None and point == "arrays":
            deadline = time.monotonic() + 5
            while not any(p.is_file() for p in drafts()) and time.monotonic() < deadline:
                pass
        _die()

    faults.install(hook)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_deleting() -> None:
    """At the second file that goes."""
    unlink, gone = os.unlink, []

    def and_die(*arguments, **options):
        if gone:
            _die()
        gone.append(arguments)
        unlink(*arguments, **options)

    os.unlink = and_die


def fork(work) -> int:
    """The exit code of a process that does `work`, negative for the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            os._exit(work() or 0)
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saves(directory: pathlib.Path) -> list[int]:
    """For each point, DIRECTORY/<point>: two steps are stored, one kept; dies in the second."""

    def two_saves(point: str) -> None:
        place = directory / point
        drafts = lambda: place.glob("2.orbax-checkpoint-tmp*/**/*")
        with CheckpointStore(place, keep=1) as checkpoints:
            checkpoints.save(1, state(1), 1, "data")
            checkpoints.wait()
            kill_at(point, drafts=drafts)
            checkpoints.save(2, state(2, 16.0), 2, "data")
            checkpoints.wait()

    return [fork(lambda point=point: two_saves(point)) for point in faults.POINTS]


def runs(config: pathlib.Path, out: pathlib.Path, seed: int, kills: int) -> list:
    """`hybrid-jax train` of one run, killed and resumed: [how, exit code] for each start.

    Of six kills four are aimed at a point of a save, one comes at any time after the begin of one,
    one at any time after the start.
    """
    chosen, ends = random.Random(seed), []
    points = chosen.sample(faults.POINTS, len(faults.POINTS))
    for number in range(kills + 1):
        how: tuple | None = None
        if number % 6 == 5:
            how = (None, 0, chosen.uniform(0.001, 3.0))
        elif number % 6 == 2:
            how = ("begin", chosen.randint(1, 2), chosen.uniform(0.001, 0.2))
        else:
            how = (points[number % len(points)], 1, 0.0)
        if number == kills:
            how = None
        options = ["--resume"] if (out / "config.yaml").exists() else ["--config", str(config)]

        def work(how=how, options=options) -> int:
            if how is not None:
                kill_at(*how, drafts=lambda: out.glob("checkpoints/*.orbax-checkpoint-tmp*/**/*"))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return cli.main(["train", "--out", str(out), *options])

        ends.append([how, fork(work)])
    return ends


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    if case == "saves":
        print(json.dumps(saves(pathlib.Path(arguments[0]))))
    else:
        config, out, seed, kills = arguments
        print(json.dumps(runs(pathlib.Path(config), pathlib.Path(out), int(seed), int(kills))))
