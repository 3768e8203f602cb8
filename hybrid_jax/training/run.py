"""The directory of a run: what lies where, how it is begun, and how it is found again."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Callable

from hybrid_jax.checkpoint import atomic
from hybrid_jax.config import text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import corpus

# Fields of a configuration that a run may be continued with others of.
MAY_CHANGE = ("steps", "parallel", "faults", "observation")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths inside RUN."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def curve(self) -> pathlib.Path:
        return self.path / "loss.png"

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.path / "tokenizer.json"

    @property
    def chat_template(self) -> pathlib.Path:
        """Of conversations; what is exported from the run carries it."""
        return self.path / "chat_template.jinja"

    @property
    def tokens(self) -> pathlib.Path:
        return self.path / "tokens"

    @property
    def origin(self) -> pathlib.Path:
        return self.path / "start.json"

    @property
    def environment(self) -> pathlib.Path:
        return self.path / "environment.json"

    @property
    def bad_batches(self) -> pathlib.Path:
        return self.path / "bad-batches"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> pathlib.Path:
        return self.path / "profile"

    @property
    def hang(self) -> pathlib.Path:
        """Of the first process; written by `watchdog`."""
        return self.path / "hang-0.txt"

    @property
    def lock(self) -> pathlib.Path:
        return self.path / ".lock"

    @property
    def contents(self) -> tuple[pathlib.Path, ...]:
        """All that a run makes."""
        stored = (self.config, self.metrics, self.checkpoints, self.curve, self.tokenizer)
        shown = (self.environment, self.bad_batches, self.tensorboard, self.profile, self.hang)
        return (*stored, *shown, self.tokens, self.chat_template, self.origin, self.lock)

    def read_config(self) -> TrainConfig:
        """The stored configuration. Raises FileNotFoundError if this is no run."""
        if not self.config.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no run to resume: there is no {self.config.name} in it. Start "
                "one without --resume, or check --out."
            )
        return text.read_yaml(TrainConfig, self.config)


@contextlib.contextmanager
def begin(config: TrainConfig, path):
    """Claim an empty or new directory for a run; yields it, locked, its configuration stored.

    An error before the training itself, of which there is nothing to resume, leaves everything as
    it was. Raises FileExistsError if there is something in the directory already, BlockingIOError
    if another process holds it.
    """
    run = RunDirectory(pathlib.Path(path))
    _check_free(run)
    made = atomic.make(run.path)
    with _locked(run):
        # Again, for another process may have been faster.
        _check_free(run)
        try:
            store_config(run, config)
            yield run
        except Exception:
            if not run.checkpoints.exists():
                _take_back(run, made)
            raise


@contextlib.contextmanager
def resume(config: TrainConfig, path):
    """The directory of a run that `config` continues, locked.

    Only the fields in `MAY_CHANGE` may have changed. Raises FileNotFoundError if there is no run,
    ValueError listing what differs, BlockingIOError if another process holds it. What is new is not
    stored yet: it may be refused.
    """
    run = RunDirectory(pathlib.Path(path))
    stored = run.read_config()
    free = {name: getattr(stored, name) for name in MAY_CHANGE}
    wanted = dataclasses.replace(config, **free)
    differences = [
        f"  {old.strip()}  (now: {new.strip()})" for old, new in _changed_lines(stored, wanted)
    ]
    if differences:
        raise ValueError(
            f"{run.path} was begun with another configuration; only "
            f"{', '.join(MAY_CHANGE)} may change on --resume:\n"
            + "\n".join(differences)
            + "\nLeave those options out, or start a new run with another --out."
        )
    with _locked(run):
        yield run


def store_config(run: RunDirectory, config: TrainConfig) -> None:
    """Write RUN/config.yaml, whole or not at all."""
    beside = _draft(run.config)
    text.write_yaml(config, beside)
    beside.replace(run.config)


def _draft(file: pathlib.Path) -> pathlib.Path:
    """As it is called until it is whole."""
    return file.with_name(f"{file.name}.new")


def _check_free(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise FileExistsError(f"{run.path} is a file; choose a directory with --out.")
    # A process that was killed at once leaves its lock, which nobody holds then, and a draft.
    left = {run.lock, _draft(run.config)}
    if run.path.exists() and set(run.path.iterdir()) - left:
        raise FileExistsError(
            f"{run.path} already holds a run or other files. Continue it with --resume, or choose "
            "another directory with --out."
        )


@contextlib.contextmanager
def _locked(run: RunDirectory):
    """Nobody else trains in this directory meanwhile; the lock ends with the process, however."""
    with run.lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(
                f"{run.path} is held by {file.read().strip() or 'another process'}, which trains "
                "there. Wait until it ends, or choose another directory with --out."
            ) from error
        except OSError:
            # A file system without locks: better no protection than no training.
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _take_back(run: RunDirectory, made: list[pathlib.Path]) -> None:
    """Remove what `begin` and `prepare_tokens` made, and nothing else."""
    shutil.rmtree(run.tokens, ignore_errors=True)
    for file in (run.config, run.tokenizer, run.chat_template, run.origin, run.lock):
        file.unlink(missing_ok=True)
        _draft(file).unlink(missing_ok=True)
    atomic.unmake(made)


def _changed_lines(stored: TrainConfig, wanted: TrainConfig):
    """Pairs of lines of the two dumps that differ, by path of the leaf."""
    old, new = (
        dict(line.split(" = ", 1) for line in text.dump(config).splitlines())
        for config in (stored, wanted)
    )
    for path in [*old, *(path for path in new if path not in old)]:
        if old.get(path) != new.get(path):
            yield f"{path} = {old.get(path, 'absent')}", new.get(path, "absent")


def prepare_tokens(
    config: TrainConfig, run: RunDirectory, note: Callable[[str], None]
) -> tuple[corpus.Part, ...]:
    """The run's sources, tokenised into RUN/tokens unless they are there or were prepared before.

    Trains and stores the tokenizer first if the run has none. Stored once, the data of a run never
    changes, whatever becomes of the text files.
    """
    wanted = range(len(config.data.sources))
    places = [corpus.place_of(run.tokens, number) / "dataset.json" for number in wanted]
    if run.tokenizer.exists() and all(place.exists() for place in places):
        parts = corpus.load(config.data, run.tokens, verify=True)
    else:
        vocab_size = config.model.vocab_size
        parts = corpus.make(config.data, run.tokens, vocab_size, run.tokenizer, note)
        template = corpus.chat_template(config.data)
        if template is not None:
            atomic.write_text(run.chat_template, template)
    corpus.check_vocabulary(parts, config.model.vocab_size)
    return parts


def load_tokens(config: TrainConfig, run: RunDirectory) -> tuple[corpus.Part, ...]:
    """What `prepare_tokens` made. Raises ValueError if it is missing or damaged."""
    return corpus.load(config.data, run.tokens)
