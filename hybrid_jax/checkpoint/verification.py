"""Which checkpoints of a training run are as they were written; what is wrong with the others."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

from hybrid_jax.checkpoint import finite, leaves, manifest, matching
from hybrid_jax.checkpoint.formats import orbax, training_run
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.rereading import read_all
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.model import lowrank


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is said of one checkpoint."""

    path: pathlib.Path
    problem: str | None
    """A sentence; None for a good one."""
    files: int
    bytes: int
    tensors: int | None
    """Parameters whose shapes fit the run's config and whose values are finite; None if the
    checkpoint lies outside its run, where no config says what they should be."""
    seconds: float


def is_of_run(path) -> bool:
    """Whether `path` is a training run, its checkpoints or one of them, and not an export."""
    path = pathlib.Path(path)
    names = (CONFIG_JSON, orbax.INDEX_NAME, "weights")
    exported = any((path / name).exists() for name in names) or any(path.glob("*.safetensors*"))
    return training_run.is_training_run(path) or not exported


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
        found = [
            each for each in folder.iterdir() if training_run.is_step(each.name) and each.is_dir()
        ]
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
    """Read every file of each, and every parameter of those that are in a run.

    One that its run removes meanwhile is passed over.
    """
    for path in paths:
        begin, problem, files, size, tensors = time.monotonic(), None, 0, 0, None
        try:
            # One that lies elsewhere may be called as its owner likes.
            name = path.name if path.parent.name == training_run.CHECKPOINTS else None
            whole = manifest.verify(path, name=name, progress=progress)
            files, size = len(whole.files), sum(count for count, _ in whole.files.values())
            if name is not None and training_run.is_training_run(path.parent.parent):
                tensors = _check_parameters(path, whole)
        except (FileNotFoundError, ValueError) as error:
            if not path.is_dir():
                continue
            problem = str(error)
        yield Verdict(path, problem, files, size, tensors, time.monotonic() - begin)


def size(paths: list[pathlib.Path]) -> int:
    """Bytes of files that `examine` will read."""
    files = (file for path in paths for file in path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_parameters(path: pathlib.Path, whole: manifest.Manifest) -> int:
    """Their number. ValueError for one of another shape, not finite, or of other contents."""
    run = path.parent.parent
    config = text.read_yaml(TrainConfig, run / CONFIG_YAML)
    source = training_run.TrainingRun(run, int(path.name), whole)
    rules = [Rule(leaf, shape, leaf) for leaf, shape in leaves.shapes(config.model).items()]
    weights = {
        name: info
        for name, info in source.tensors.items()
        if not name.endswith((lowrank.A, lowrank.B))
    }
    matching.of_rules(rules, weights).require(path, source.locate)
    problems: list[str] = []
    for name, array in read_all(source, problems):
        finite.check(array, name, source.locate(name))
    if problems:
        raise ValueError(problems[0])
    return len(source.tensors)
