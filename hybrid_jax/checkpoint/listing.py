"""What a checkpoint directory holds, by its headers and indexes, however damaged it is."""

import dataclasses
import json
import pathlib

from hybrid_jax.checkpoint import manifest
from hybrid_jax.checkpoint.formats import orbax, training_run
from hybrid_jax.checkpoint.formats.files import LocalFolder
from hybrid_jax.checkpoint.formats.hf_directory import SUFFIX, read_index
from hybrid_jax.checkpoint.formats.links import inside
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile
from hybrid_jax.checkpoint.formats.safetensors_writer import INDEX_NAME
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON

HUGGING_FACE, ORBAX, RUN = "Hugging Face", "Orbax", "training run"


@dataclasses.dataclass
class Listing:
    """Names, and what is known of each without reading weights."""

    path: pathlib.Path
    """Where the tensors are; of a run, the checkpoint that was chosen."""
    container: str
    """HUGGING_FACE, ORBAX or RUN."""
    vocabulary: str
    """`published`; `tree`, names of our own a layer; `leaves`, parameters as the model has them."""
    tensors: dict[str, TensorInfo | None] = dataclasses.field(default_factory=dict)
    """None where an index names a tensor whose file is not here or cannot be read."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensor -> file; by name, of Hugging Face directories only."""
    absent: list[str] = dataclasses.field(default_factory=list)
    """Files that an index names and that are not here."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """What is damaged, a sentence each; absent files are no part of it."""
    index_bytes: int | None = None
    """`metadata.total_size` of the index."""
    step: int | None = None
    """Of a run."""


def of_directory(path, step: int | None = None) -> Listing:
    """List a directory. ValueError if it is no checkpoint, or has none of `step`."""
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected a checkpoint directory.")
    if training_run.is_training_run(path):
        return _run(path, step)
    if step is not None:
        raise ValueError(f"{path} is one checkpoint and no run: it has no step {step} to choose.")
    if orbax.is_orbax(path) or (path / "weights").is_dir():
        return _orbax(path)
    if (path / CONFIG_JSON).is_file() or list(path.glob("*.safetensors*")):
        return _hugging_face(path)
    raise ValueError(
        f"{path} is no checkpoint: expected config.json with safetensors files (Hugging Face), "
        f"{orbax.INDEX_NAME} with Orbax weights, or the directory of a training run."
    )


def _hugging_face(path: pathlib.Path) -> Listing:
    found, folder = Listing(path, HUGGING_FACE, "published"), LocalFolder(path)
    try:
        weight_map = read_index(folder)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        weight_map = None
    there = folder.names()
    here = [name for name in there if name.endswith(SUFFIX)]
    if weight_map is None:
        _without_index(found, here)
        return found
    found.index_bytes = _total_size(path / INDEX_NAME)
    found.tensors = dict.fromkeys(weight_map)
    found.files = dict(weight_map)
    for name in sorted(set(weight_map.values())):
        if name in there:
            _add_indexed(found, name)
        else:
            found.absent.append(name)
    others = sorted(set(here) - set(weight_map.values()))
    if others:
        found.problems.append(
            f"{len(others)} safetensors files are not named in {INDEX_NAME}, first {others[0]}: "
            "remove them or the index."
        )
    return found


def _without_index(found: Listing, here: list[str]) -> None:
    if not here:
        found.problems.append(
            f"{found.path} holds no safetensors file. Pickled weights, if there are any, are never "
            "opened here."
        )
    if len(here) > 1:
        found.problems.append(
            f"{found.path} holds {len(here)} safetensors files but no {INDEX_NAME} that says what "
            "belongs together. Download the index."
        )
    for name in here:
        for tensor, info in _header(found, name).items():
            if tensor in found.files:
                found.problems.append(
                    f"The tensor {tensor!r} is in {found.files[tensor]} and in {name}."
                )
            found.tensors[tensor], found.files[tensor] = info, name


def _add_indexed(found: Listing, name: str) -> None:
    """The tensors of one shard, held against the index."""
    inside_it = _header(found, name)
    if not inside_it:
        return
    named = {tensor for tensor, file in found.files.items() if file == name}
    for what, wrong in (
        ("does not hold", sorted(named - inside_it.keys())),
        ("also holds", sorted(inside_it.keys() - named)),
    ):
        if wrong:
            but = "" if what == "also holds" else f", though {INDEX_NAME} says so"
            found.problems.append(f"{name} {what} {wrong[0]!r}{but} ({len(wrong)} such tensors).")
    # What the index does not name is no part of the checkpoint, and said above.
    for tensor in named & inside_it.keys():
        found.tensors[tensor] = inside_it[tensor]


def _header(found: Listing, name: str) -> dict[str, TensorInfo]:
    """Empty for a file that cannot be read, which is said."""
    try:
        file = SafetensorsFile(inside(found.path, name))
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return {}
    file.close()
    return file.tensors


def _total_size(path: pathlib.Path) -> int | None:
    metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # Some writers store a float.
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    return total if isinstance(total, int) and total > 0 else None


def _orbax(path: pathlib.Path) -> Listing:
    has_published = (path / CONFIG_JSON).is_file()
    found = Listing(path, ORBAX, "published" if has_published else "tree")
    try:
        directory = orbax.OrbaxDirectory(path)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return found
    found.vocabulary = directory.vocabulary
    found.tensors = dict(directory.tensors)
    return found


def _run(path: pathlib.Path, step: int | None) -> Listing:
    """The newest checkpoint whose files have the names and sizes of its manifest."""
    steps = training_run.steps(path, step)
    problems: list[str] = []
    for each in reversed(steps):
        place = path / training_run.CHECKPOINTS / str(each)
        try:
            _, wrong = manifest.glance(place, name=str(each))
            if not wrong:
                tensors: dict[str, TensorInfo | None] = {**training_run.stored(place)}
                return Listing(place, RUN, "leaves", tensors, problems=problems, step=each)
            problems.append(f"Step {each} is not what was written: {'; '.join(wrong[:5])}.")
        except (manifest.Damaged, FileNotFoundError, ValueError) as error:
            problems.append(f"Step {each}: {error}")
    place = path / training_run.CHECKPOINTS / str(steps[-1])
    return Listing(place, RUN, "leaves", problems=problems, step=steps[-1])
