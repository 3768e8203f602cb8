"""What a conversion is made from, and how: two starts with the same of both go on with one work."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

from hybrid_jax import __version__
from hybrid_jax.checkpoint import sidecars
from hybrid_jax.checkpoint.formats import protocol, training_run
from hybrid_jax.checkpoint.opened import Checkpoint


@dataclasses.dataclass(frozen=True)
class Origin:
    """Digests by what they are of; equal ones make equal bytes."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all parts."""
        return _digest(dict(self.parts))

    def differences(self, other: "Origin") -> list[str]:
        """What is not the same."""
        names = sorted(self.parts.keys() | other.parts.keys())
        return [name for name in names if self.parts.get(name) != other.parts.get(name)]


def of(checkpoint: Checkpoint, layout: protocol.Layout, options: Mapping) -> Origin:
    """Names, sizes and times of the source's files; the options; what will lie where; our version.

    The place of the source does not count, for machines may know it by other paths.
    """
    units = [
        [[info.name, info.dtype, list(info.shape)] for info in unit.infos] for unit in layout.units
    ]
    return Origin(
        {
            "source": _digest(_files(checkpoint)),
            "options": _digest(dict(options)),
            "layout": _digest(units),
            "version": __version__,
        }
    )


def _files(checkpoint: Checkpoint) -> list[list]:
    """[path, bytes, time of the last change] of everything that is read."""
    path, found = checkpoint.path, []
    weights = path
    if checkpoint.step is not None:
        # The run itself may go on meanwhile.
        weights = path / training_run.CHECKPOINTS / str(checkpoint.step)
        company = [path / sidecars.CONFIG_YAML, *sidecars.find(path)]
        found += [_stat(path, file) for file in company if file.is_file()]
    for place, folders, names in os.walk(weights):
        # The Hub's client keeps records of its own in such folders.
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [_stat(path, pathlib.Path(place, name)) for name in names]
    return sorted(found)


def _stat(root: pathlib.Path, file: pathlib.Path) -> list:
    name = file.relative_to(root).as_posix()
    try:
        stat = file.stat()
    except OSError:
        # A link to nothing; whoever reads it says so.
        return [name, -1, -1]
    return [name, stat.st_size, stat.st_mtime_ns]


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
