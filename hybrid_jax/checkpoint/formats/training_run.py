"""The parameters of a training run: a good step under RUN/checkpoints, by our own paths."""

import pathlib
import warnings

import numpy as np

from hybrid_jax.checkpoint import digests, manifest
from hybrid_jax.checkpoint.formats import orbax, protocol

CHECKPOINTS, ITEM = "checkpoints", "params"


class TrainingRun:
    """Parameters of one checkpoint of a run; the optimiser's state is left alone.

    All files are verified first, every parameter as it is read.
    """

    def __init__(
        self, directory, step: int | None = None, verified: manifest.Manifest | None = None
    ):
        """Of `step`, or of the newest that is as it was written: others are named in a warning.

        `verified` is the manifest of `step`, if its files have just been held against it.

        Raises ValueError if there is none, or `step` is damaged, unfinished or not there.
        """
        directory = pathlib.Path(directory)
        if step is not None and verified is not None:
            self.step, self._manifest = step, verified
        else:
            self.step, self._manifest = _good_step(directory, step)
        self.path = (directory / CHECKPOINTS / str(self.step)).absolute()
        self._orbax = _orbax()
        self.bytes_read = 0
        self.tensors = stored(self.path)

    def read(self, name: str) -> np.ndarray:
        """One parameter, all layers of its stack."""
        info = self.tensors[name]
        target = {ITEM: {name: np.empty(info.shape, protocol.DTYPES[info.dtype])}}
        try:
            with orbax.reading():
                array = np.asarray(self._orbax.load_checkpointables(self.path, target)[ITEM][name])
        except Exception as error:
            # Whatever Orbax and TensorStore raise for damaged files, it comes without a name.
            raise ValueError(f"{self.path}: {name!r} cannot be read: {error!r:.500}") from error
        self.bytes_read += array.nbytes
        bound = f"{ITEM}/{name}"
        try:
            digests.check_whole(bound, self._manifest.arrays[bound], array)
        except (KeyError, manifest.Damaged) as error:
            raise manifest.Damaged(f"{self.path}: {error}") from error
        return array

    def read_many(self, names):
        """The named parameters one after the other."""
        for name in names:
            yield name, self.read(name)

    def locate(self, name: str) -> str:
        """Path of the checkpoint."""
        return str(self.path)

    def close(self) -> None:
        """Nothing is held open."""


def is_training_run(directory) -> bool:
    """Whether a directory was made by `hybrid-jax train`."""
    directory = pathlib.Path(directory)
    return (directory / "config.yaml").is_file() and (directory / CHECKPOINTS).is_dir()


def is_step(name: str) -> bool:
    """Whether a directory is called by a step. Digits of other scripts, and ², are digits too."""
    return name.isascii() and name.isdigit()


def stored(path: pathlib.Path) -> dict[str, protocol.TensorInfo]:
    """The parameters of one checkpoint by its metadata; ValueError if it cannot be read."""
    path = path.absolute()
    try:
        found = dict(_orbax().metadata(path, ITEM).metadata)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error!r:.500}") from error
    return {name: _info(name, entry, path) for name, entry in found.items()}


def steps(directory, step: int | None = None) -> list[int]:
    """The steps that a run has a checkpoint of, or that one; ValueError if there is none."""
    found = (pathlib.Path(directory) / CHECKPOINTS).iterdir()
    present = sorted(int(path.name) for path in found if path.is_dir() and is_step(path.name))
    if not present:
        raise ValueError(f"{directory} is a training run that has no checkpoint yet.")
    if step not in (None, *present):
        raise ValueError(f"{directory} has no checkpoint of step {step}; it has {present}.")
    return present if step is None else [step]


def _good_step(directory: pathlib.Path, step: int | None) -> tuple[int, manifest.Manifest]:
    """Its files are held against their checksums."""
    problems = []
    for each in reversed(steps(directory, step)):
        try:
            whole = manifest.verify(directory / CHECKPOINTS / str(each), name=str(each))
        except (manifest.Damaged, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem} Step {each} is taken instead.", stacklevel=2)
        return each, whole
    raise ValueError(f"{directory} has no good checkpoint: {' '.join(problems)}")


def _info(name, entry, path) -> protocol.TensorInfo:
    dtype = protocol.TAGS.get(np.dtype(entry.dtype)) if hasattr(entry, "dtype") else None
    if dtype is None:
        raise ValueError(f"{path}: {name!r} is no array of a known dtype; got {entry!r:.200}.")
    return protocol.TensorInfo(name, dtype, tuple(entry.shape))


def _orbax():
    from orbax.checkpoint import v1

    return v1
