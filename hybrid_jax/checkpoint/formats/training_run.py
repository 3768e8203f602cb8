"""The parameters of a training run: the newest step under RUN/checkpoints, by our own paths."""

import pathlib

import numpy as np

from hybrid_jax.checkpoint.formats import protocol

CHECKPOINTS, ITEM = "checkpoints", "params"


class TrainingRun:
    """Parameters of the newest whole checkpoint of a run; the optimiser's state is left alone."""

    def __init__(self, directory):
        steps = _steps(pathlib.Path(directory))
        if not steps:
            raise ValueError(f"{directory} is a training run that has no checkpoint yet.")
        self.step = steps[-1]
        self.path = (pathlib.Path(directory) / CHECKPOINTS / str(self.step)).absolute()
        self._orbax = _orbax()
        try:
            stored = dict(self._orbax.metadata(self.path, ITEM).metadata)
        except Exception as error:
            raise ValueError(f"{self.path} cannot be read: {error!r:.500}") from error
        self.tensors = {name: _info(name, entry, self.path) for name, entry in stored.items()}

    def read(self, name: str) -> np.ndarray:
        """One parameter, all layers of its stack."""
        info = self.tensors[name]
        target = {ITEM: {name: np.empty(info.shape, protocol.DTYPES[info.dtype])}}
        context = self._orbax.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                return np.asarray(self._orbax.load_checkpointables(self.path, target)[ITEM][name])
        except Exception as error:
            # Whatever Orbax and TensorStore raise for damaged files, it comes without a name.
            raise ValueError(f"{self.path}: {name!r} cannot be read: {error!r:.500}") from error

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


def _steps(directory: pathlib.Path) -> list[int]:
    # An unfinished step has a longer name until one rename gives it this one.
    found = (directory / CHECKPOINTS).iterdir()
    return sorted(int(path.name) for path in found if path.is_dir() and path.name.isdigit())


def _info(name, entry, path) -> protocol.TensorInfo:
    dtype = protocol.TAGS.get(np.dtype(entry.dtype)) if hasattr(entry, "dtype") else None
    if dtype is None:
        raise ValueError(f"{path}: {name!r} is no array of a known dtype; got {entry!r:.200}.")
    return protocol.TensorInfo(name, dtype, tuple(entry.shape))


def _orbax():
    from orbax.checkpoint import v1

    return v1
