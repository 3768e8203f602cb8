"""A run opened by all of its processes: the first makes its files, the others wait and read."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

import jax

from hybrid_jax.config import text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import corpus
from hybrid_jax.training import run as run_lib
from sharding import processes

# A network file system shows a new file to other machines within a minute.
_SECONDS_TO_APPEAR = 90


@dataclasses.dataclass(frozen=True)
class Opened:
    """What every process needs to train."""

    run: run_lib.RunDirectory
    parts: tuple[corpus.Part, ...]
    """The sources, tokenised."""
    fingerprint: str
    """Identifies the data."""


@contextlib.contextmanager
def open_run(
    config: TrainConfig, path, *, resume: bool, note: Callable[[str], None]
) -> Iterator[Opened]:
    """Begin or resume the run in `path`; process 0 locks it and prepares its tokens.

    Raises what `run.begin`, `run.resume` and `run.prepare_tokens` do; ValueError if processes got
    other configurations or do not see the same directory.
    """
    run = run_lib.RunDirectory(pathlib.Path(path))
    with contextlib.ExitStack() as held:

        def make() -> str:
            parts = _claim(config, run, resume, held, note)
            facts = {"fingerprint": corpus.fingerprint(parts), "config": _digest(config)}
            return json.dumps(facts | {"holder": _holder(run)})

        facts = json.loads(processes.from_first(make))
        opened: list[Opened] = []

        def see() -> None:
            if not processes.is_first():
                _check_same(config, run, facts)
            opened.append(Opened(run, run_lib.load_tokens(config, run), facts["fingerprint"]))

        processes.all_pass(see)
        yield opened[0]


def _claim(config: TrainConfig, run, resume: bool, held, note) -> tuple[corpus.Part, ...]:
    """Enter the directory into `held`, with the tokens in it."""
    enter = run_lib.resume if resume else run_lib.begin
    held.enter_context(enter(config, run.path))
    return run_lib.prepare_tokens(config, run, note)


def _check_same(config: TrainConfig, run: run_lib.RunDirectory, facts: dict) -> None:
    """This process means the run that process 0 holds. Raises ValueError."""
    if _digest(config) != facts["config"]:
        raise ValueError(
            "This process was given another configuration than process 0. Start all processes "
            "with the same options."
        )
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while _holder(run) != facts["holder"]:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run.path} on {socket.gethostname()} (process {jax.process_index()}) is not the "
                f"directory that process 0 holds ({facts['holder']}). --out must be on a file "
                "system that all processes share."
            )
        time.sleep(0.5)


def _holder(run: run_lib.RunDirectory) -> str:
    """Who says to hold the directory, as far as it is seen from here."""
    try:
        return run.lock.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _digest(config: TrainConfig) -> str:
    return hashlib.sha256(text.dump(config).encode()).hexdigest()[:16]
