"""What a checkpoint directory holds, by its headers and indexes, however damaged it is."""

import concurrent.futures
import dataclasses
import json
import pathlib

from hybrid_jax.checkpoint import manifest
from hybrid_jax.checkpoint.formats import folders, orbax, training_run
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.hf_directory import SUFFIX, read_index
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile
from hybrid_jax.checkpoint.formats.safetensors_writer import INDEX_NAME
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON

HUGGING_FACE, ORBAX, RUN = "Hugging Face", "Orbax", "training run"
# Files opened at a time.
_OPENING = 16


@dataclasses.dataclass
class Listing:
    """Names, and what is known of each without reading weights."""

    folder: Folder
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
    """List a directory, which may be in object storage if it is Hugging Face's.

    ValueError if it is no checkpoint, or has none of `step`.
    """
    folder = folders.at(path)
    local = folder.path if isinstance(folder, LocalFolder) else None
    if local is not None and training_run.is_training_run(local):
        return _run(local, step)
    if step is not None:
        raise ValueError(f"{folder} is one checkpoint and no run: it has no step {step} to choose.")
    if local is not None and (orbax.is_orbax(local) or (local / "weights").is_dir()):
        return _orbax(local)
    present = folder.names()
    if CONFIG_JSON in present or any(SUFFIX in name for name in present):
        return _hugging_face(folder, present)
    raise ValueError(
        f"{folder} is no checkpoint: expected config.json with safetensors files (Hugging Face) "
        f"or, on a disk, {orbax.INDEX_NAME} with Orbax weights, or the directory of a training run."
    )


def _hugging_face(folder: Folder, present: list[str]) -> Listing:
    found = Listing(folder, HUGGING_FACE, "published")
    try:
        weight_map = read_index(folder)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        weight_map = None
    here = [name for name in present if name.endswith(SUFFIX)]
    if weight_map is None:
        _without_index(found, here)
        return found
    found.index_bytes = _total_size(folder)
    found.tensors = dict.fromkeys(weight_map)
    found.files = dict(weight_map)
    named: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        named.setdefault(name, set()).add(tensor)
    found.absent += sorted(named.keys() - set(here))
    for name, tensors in _headers(found, [name for name in here if name in named]).items():
        _add_indexed(found, name, named[name], tensors)
    others = sorted(set(here) - named.keys())
    if others:
        found.problems.append(
            f"{len(others)} safetensors files are not named in {INDEX_NAME}, first {others[0]}: "
            "remove them or the index."
        )
    return found


def _without_index(found: Listing, here: list[str]) -> None:
    if not here:
        found.problems.append(
            f"{found.folder} holds no safetensors file. Pickled weights, if there are any, are "
            "never opened here."
        )
    if len(here) > 1:
        found.problems.append(
            f"{found.folder} holds {len(here)} safetensors files but no {INDEX_NAME} that says "
            "what belongs together. Download the index."
        )
    for name, tensors in _headers(found, here).items():
        for tensor, info in tensors.items():
            if tensor in found.files:
                found.problems.append(
                    f"The tensor {tensor!r} is in {found.files[tensor]} and in {name}."
                )
            found.tensors[tensor], found.files[tensor] = info, name


def _add_indexed(
    found: Listing, name: str, named: set[str], inside_it: dict[str, TensorInfo]
) -> None:
    """The tensors of one shard, held against those that the index names there."""
    if not inside_it:
        return
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


def _headers(found: Listing, names: list[str]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by file; none for one that cannot be read, which is said."""

    def header(name: str) -> dict[str, TensorInfo] | str:
        try:
            file = SafetensorsFile(found.folder.where(name), found.folder.open(name))
        except (ValueError, OSError) as error:
            return str(error)
        file.close()
        return file.tensors

    # Each is a request or two to a store.
    with concurrent.futures.ThreadPoolExecutor(_OPENING) as pool:
        said = dict(zip(names, pool.map(header, names), strict=True))
    found.problems += [error for error in said.values() if isinstance(error, str)]
    return {name: {} if isinstance(each, str) else each for name, each in said.items()}


def _total_size(folder: Folder) -> int | None:
    metadata = json.loads(folder.read_bytes(INDEX_NAME)).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # Some writers store a float.
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    return total if isinstance(total, int) and total > 0 else None


def _orbax(path: pathlib.Path) -> Listing:
    has_published = (path / CONFIG_JSON).is_file()
    found = Listing(LocalFolder(path), ORBAX, "published" if has_published else "tree")
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
                chosen = LocalFolder(place)
                return Listing(chosen, RUN, "leaves", tensors, problems=problems, step=each)
            problems.append(f"Step {each} is not what was written: {'; '.join(wrong[:5])}.")
        except (manifest.Damaged, FileNotFoundError, ValueError) as error:
            problems.append(f"Step {each}: {error}")
    place = path / training_run.CHECKPOINTS / str(steps[-1])
    return Listing(LocalFolder(place), RUN, "leaves", problems=problems, step=steps[-1])
