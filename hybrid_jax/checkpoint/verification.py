"""Which checkpoints of a training run are as they were written; what is wrong with the others."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

from hybrid_jax.checkpoint import manifest
from hybrid_jax.checkpoint.formats import training_run


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is said of one checkpoint."""

    path: pathlib.Path
    problem: str | None
    """A sentence; None for a good one."""
    files: int
    bytes: int
    seconds: float


def find(path, step: int | None = None) -> list[pathlib.Path]:
    """The checkpoints that `path` means, oldest first: a run, its checkpoints, or one of them.

    Raises ValueError if there is none, or none of that step.
    """
    path = pathlib.Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; give a training run or one of its checkpoints.")
    if (path / manifest.NAME).is_file():
        found = [path]
    else:
        inside = path / training_run.CHECKPOINTS
        folder = inside if inside.is_dir() else path
        found = [each for each in folder.iterdir() if each.name.isdigit() and each.is_dir()]
        found.sort(key=lambda each: int(each.name))
    if not found:
        raise ValueError(f"{path} has no checkpoint: expected directories named by their step.")
    if step is None:
        return found
    asked = [each for each in found if each.name == str(step)]
    if not asked:
        raise ValueError(
            f"{path} has no checkpoint of step {step}; it has {[int(p.name) for p in found]}."
        )
    return asked


def examine(
    paths: list[pathlib.Path], progress: Callable[[int], None] = lambda count: None
) -> Iterator[Verdict]:
    """Read every file of each. One that its run removes meanwhile is passed over."""
    for path in paths:
        begin, problem, files, size = time.monotonic(), None, 0, 0
        try:
            # One that lies elsewhere may be called as its owner likes.
            name = path.name if path.parent.name == training_run.CHECKPOINTS else None
            whole = manifest.verify(path, name=name, progress=progress)
            files, size = len(whole.files), sum(count for count, _ in whole.files.values())
        except (FileNotFoundError, manifest.Damaged) as error:
            if not path.is_dir():
                continue
            problem = str(error)
        yield Verdict(path, problem, files, size, time.monotonic() - begin)


def size(paths: list[pathlib.Path]) -> int:
    """Bytes that `examine` will read."""
    files = (file for path in paths for file in path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
