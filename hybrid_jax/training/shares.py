"""What each process knows of a checkpoint that all wrote, in files for the first to collect."""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax

from hybrid_jax.checkpoint import atomic, digests, manifest

# Until what one process wrote is seen by the first on a network file system.
_SECONDS_TO_APPEAR = 90


def leave(
    directory: pathlib.Path, number: int, arrays: Mapping[str, digests.Array], files: manifest.Files
) -> None:
    """Say what this process holds and has hashed of the `number`th checkpoint of this start."""
    text = json.dumps({"arrays": digests.to_json(arrays), "files": files})
    atomic.write_text(_path(directory, number, jax.process_index()), text)


def collect(
    directory: pathlib.Path, number: int, arrays: Mapping[str, digests.Array], files: manifest.Files
) -> tuple[dict[str, digests.Array], manifest.Files]:
    """What all processes have said, with the first one's own.

    Raises OSError if one's share does not appear.
    """
    parts, all_files = [arrays], dict(files)
    for process in range(1, jax.process_count()):
        share = _wait(_path(directory, number, process))
        parts.append(digests.from_json(share["arrays"]))
        all_files |= {name: (size, digest) for name, (size, digest) in share["files"].items()}
    for process in range(1, jax.process_count()):
        _path(directory, number, process).unlink(missing_ok=True)
    return digests.merge(parts), all_files


def clear(directory: pathlib.Path) -> None:
    """Remove what an earlier start has left."""
    for path in directory.glob(".share-*"):
        path.unlink(missing_ok=True)


def _path(directory: pathlib.Path, number: int, process: int) -> pathlib.Path:
    return directory / f".share-{number}-{process}"


def _wait(path: pathlib.Path) -> dict:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(path.read_text(encoding="utf-8"))
        if time.monotonic() > deadline:
            raise OSError(
                f"{path.name} did not appear within {_SECONDS_TO_APPEAR} s: another process could "
                "not write it, or does not see the same directory"
            )
        time.sleep(0.05)
