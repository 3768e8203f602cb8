"""The directory of a run: what lies where, how it is begun, and how it is found again."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Callable

from hybrid_jax import data as data_lib
from hybrid_jax.checkpoint import atomic
from hybrid_jax.config import text
from hybrid_jax.config.training import Text, TrainConfig
from hybrid_jax.data import store as store_lib

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
    def tokens(self) -> pathlib.Path:
        return self.path / "tokens"

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
        return (*stored, *shown, self.tokens, self.lock)

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
    beside = run.config.with_name("config.yaml.new")
    text.write_yaml(config, beside)
    beside.replace(run.config)


def _check_free(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise FileExistsError(f"{run.path} is a file; choose a directory with --out.")
    # A process that was killed at once leaves its lock, which nobody holds then.
    if run.path.exists() and any(path != run.lock for path in run.path.iterdir()):
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
    for file in (run.config, run.tokenizer, run.lock):
        file.unlink(missing_ok=True)
        # As it is called until it is whole.
        file.with_name(f"{file.name}.new").unlink(missing_ok=True)
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


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A run's data, ready to be cut into windows."""

    training: data_lib.TokenStore
    heldout: data_lib.TokenStore | None


def prepare_tokens(
    config: TrainConfig, run: RunDirectory, documents, note: Callable[[str], None]
) -> Tokens:
    """The run's token stores: read if they are there, else made from `documents()`.

    Trains and stores the tokenizer first if the run has none. Stored once, the data of a run never
    changes, whatever becomes of the text files.
    """
    if not (run.tokens / "training.json").exists():
        _tokenise(config, run, documents(), note)
    tokens = load_tokens(run)
    tokens.training.check_vocabulary(config.model.vocab_size, "training text")
    if tokens.heldout is not None:
        tokens.heldout.check_vocabulary(config.model.vocab_size, "held-out text")
    return tokens


def load_tokens(run: RunDirectory) -> Tokens:
    """What `prepare_tokens` made. Raises ValueError if it is missing or damaged."""
    training = store_lib.TokenStore.load(run.tokens, "training")
    heldout = None
    if (run.tokens / "heldout.json").exists():
        heldout = store_lib.TokenStore.load(run.tokens, "heldout")
    return Tokens(training, heldout)


def read_documents(config: Text, note: Callable[[str], None]) -> list[data_lib.Document]:
    """The documents `config` names; what had to be left out is said, at most three times."""
    documents, complaints = data_lib.find_documents(config.path, config.pattern, config.exclude)
    for complaint in complaints[:3]:
        note(complaint)
    if len(complaints) > 3:
        note(f"... and {len(complaints) - 3} more files left out.")
    return documents


def _tokenise(config: TrainConfig, run: RunDirectory, documents, note) -> None:
    fraction = config.data.heldout_fraction
    heldout = [d for d in documents if data_lib.is_heldout(d.name, fraction)]
    training = [d for d in documents if not data_lib.is_heldout(d.name, fraction)]
    if not training:
        raise ValueError(
            f"All {len(documents)} documents fell into the held-out part. Give more documents, or "
            "--data.heldout-fraction 0."
        )
    if run.tokenizer.exists():
        try:
            tokenizer = data_lib.Tokenizer.load(run.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error} Delete it to have one made from the text again.") from error
    else:
        tokenizer = _tokenizer(config, training, note)
        tokenizer.save(run.tokenizer)
    note(f"Tokenising {len(training)} documents, {len(heldout)} held out ...")
    if heldout:
        store_lib.tokenise(heldout, tokenizer).save(run.tokens, "heldout")
    store = store_lib.tokenise(training, tokenizer)
    note(f"{len(store.ids):,} training tokens, vocabulary {tokenizer.vocab_size}.")
    store.save(run.tokens, "training")


def _tokenizer(config: TrainConfig, training, note) -> data_lib.Tokenizer:
    if config.data.tokenizer is not None:
        return data_lib.Tokenizer.load(config.data.tokenizer)
    megabytes = sum(len(document.text) for document in training) / 1e6
    note(f"Training a tokenizer on {len(training)} documents ({megabytes:.1f} MB) ...")
    return data_lib.train_tokenizer((d.text for d in training), config.model.vocab_size)
