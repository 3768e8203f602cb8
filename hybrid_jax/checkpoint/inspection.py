"""What a checkpoint directory is and what is wrong with it, by headers and metadata alone."""

import dataclasses

from hybrid_jax.checkpoint import (
    digests,
    fp8,
    hf_config,
    leaves,
    manifest,
    matching,
    nearest,
    sizes,
)
from hybrid_jax.checkpoint import listing as listing_lib
from hybrid_jax.checkpoint import sidecars as sidecars_lib
from hybrid_jax.checkpoint.formats import folders
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.protocol import DTYPES, TensorInfo
from hybrid_jax.checkpoint.names import tree
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import presets, text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.config.tuning import LoRA
from hybrid_jax.model import lowrank


@dataclasses.dataclass
class Inspection:
    """Everything that `inspect` says."""

    folder: Folder
    listing: listing_lib.Listing
    config: model_lib.ModelConfig | None = None
    """What the directory's own config describes; None if there is none that can be read."""
    model: model_lib.ModelConfig | None = None
    """What the tensors are held against."""
    description: hf_config.Description | None = None
    """config.json, for published names."""
    closest: nearest.Nearest | None = None
    """The preset that was asked for, or that is nearest."""
    match: matching.Match | None = None
    """Against the preset that was asked for, else the config, else the nearest preset."""
    against: str | None = None
    """What that was, in words."""
    parameters: tuple[int, int] | None = None
    """Numbers in all, and those that a token meets."""
    quantization: str = "none"
    checksums: str = ""
    """What is known of the manifest."""
    sidecars: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Worth knowing, and not wrong."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Empty for a whole checkpoint."""

    @property
    def infos(self) -> dict[str, TensorInfo | None]:
        """Stored tensors; those whose form is not known as the config asks for them."""
        if self.match is None:
            return dict(self.listing.tensors)
        wanted = sizes.assumed(self.match, self.description)
        return {
            name: wanted.get(name) if info is None else info
            for name, info in self.listing.tensors.items()
        }

    @property
    def has_all_forms(self) -> bool:
        """Whether every shape and dtype was read, none taken from the config."""
        return None not in self.listing.tensors.values()


def inspect(
    path, *, preset: str | None = None, step: int | None = None, need_files: bool = True
) -> Inspection:
    """Look at a directory of any format. What is wrong with it is in `problems`, not raised.

    Args:
        path: The directory, which may be in object storage if it is Hugging Face's; no weights are
            read.
        preset: Hold the tensors against this preset instead of the directory's own config.
        step: Of a run; its newest without.
        need_files: Whether files that an index names and that are not there are a problem; else a
            note.

    Raises:
        ValueError: it is no checkpoint at all, or there is no such preset or step.
    """
    asked = None if preset is None else presets.get(preset)
    listing = listing_lib.of_directory(path, step)
    found = Inspection(folders.at(path), listing)
    found.problems += found.listing.problems
    if found.listing.absent:
        absent = found.listing.absent
        count = len(set(found.listing.files.values()))
        said = (
            f"{len(absent)} of {count} files that the index names are not here, first {absent[0]}."
        )
        (found.problems if need_files else found.notes).append(said)
    run = _read_config(found)
    _choose(found, asked)
    if found.match is not None:
        found.problems += found.match.problems()
    _describe_quantization(found)
    _describe_files(found, run)
    return found


def _read_config(found: Inspection) -> TrainConfig | None:
    """Of a run, all of its settings are returned."""
    run = None
    try:
        if found.listing.container == listing_lib.RUN:
            run = text.read_yaml(TrainConfig, found.folder.where(sidecars_lib.CONFIG_YAML))
            found.config = run.model
        elif found.listing.vocabulary == "tree":
            where = found.folder.where(sidecars_lib.CONFIG_YAML)
            found.config = text.read_yaml(model_lib.ModelConfig, where)
        else:
            where = found.folder.where(sidecars_lib.CONFIG_JSON)
            values = hf_config.read_from(found.folder, sidecars_lib.CONFIG_JSON)
            found.description = hf_config.describe(values, where)
            found.config = found.description.model
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
    return run


def _choose(found: Inspection, asked: model_lib.ModelConfig | None) -> None:
    """The model that the tensors are held against, and the match."""
    stored = found.listing.tensors
    if asked is not None:
        differences = () if found.config is None else nearest.differences(found.config, asked)
        found.closest = nearest.Nearest((asked.name,), differences)
        found.against = f"the preset {asked.name}"
        if differences:
            found.problems.append(f"The config is not that of {asked.name}: {differences[0]}.")
    elif found.config is not None:
        found.closest, found.against = nearest.of_config(found.config), "its config"
    elif stored and found.listing.vocabulary == "published":
        found.closest = nearest.of_names(stored)
        asked = presets.get(found.closest.names[0])
        found.against = f"the preset {asked.name}, whose names are nearest"
    found.model = asked or found.config
    if found.model is None:
        return
    try:
        found.match = _match(found, found.model)
    except ValueError as error:
        found.problems.append(str(error))
    else:
        found.parameters = sizes.parameters(found.model, found.match.rules.values())


def _match(found: Inspection, model: model_lib.ModelConfig) -> matching.Match:
    stored = found.listing.tensors
    if found.listing.vocabulary == "published":
        described = found.description
        if described is None:
            kind = "minimax_m2" if hf_config.has_sigmoid_router(model) else "minimax"
            described = hf_config.Description(model, {}, kind)
        where = found.folder.where(sidecars_lib.CONFIG_JSON)
        described = dataclasses.replace(described, model=model)
        match = matching.published(described, stored, where)
        if found.listing.index_bytes is not None and not found.has_all_forms:
            total = sizes.compare_total(match, described, found.listing.index_bytes)
            found.notes.append(total)
        return match
    shapes = leaves.shapes(model)
    if found.listing.vocabulary == "tree":
        return matching.of_rules(tree.rules(model, shapes), stored)
    ends = (lowrank.A, lowrank.B)
    thin = [name for name in stored if name.endswith(ends)]
    match = matching.of_rules(
        [Rule(leaf, shape, leaf) for leaf, shape in shapes.items()],
        {name: info for name, info in stored.items() if name not in thin},
    )
    return dataclasses.replace(match, derived=thin)


def _describe_quantization(found: Inspection) -> None:
    dtypes: dict[str, int] = {}
    for info in found.listing.tensors.values():
        if info is not None:
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    block = None
    if found.description is not None:
        try:
            block = fp8.block_size(found.description.json, "config.json")
        except ValueError:
            # Said where the tensors are matched.
            found.quantization = "unknown"
            return
    if block is not None and found.match is not None:
        count = len(found.match.scales)
        found.quantization = f"FP8, {count:,} weights in blocks of {block[0]} x {block[1]}"
    elif any(tag in dtypes for tag in ("I8", "U8", *fp8.FP8_TAGS)):
        found.quantization = f"unknown: {dtypes}, and no quantization_config"


def _describe_files(found: Inspection, run: TrainConfig | None) -> None:
    if run is not None and isinstance(run.tuning, LoRA):
        found.notes.append("What LoRA learnt lies beside its weights; reading merges the two.")
    if found.match is not None and found.match.vision:
        count = len(found.match.vision)
        found.notes.append(f"{count} tensors of the vision part are not read or converted.")
    if found.match is not None and found.match.derived and run is None:
        count = len(found.match.derived)
        found.notes.append(f"{count} tensors follow from the config, or are no part of the model.")
    _compare_index(found)
    try:
        found.sidecars = sidecars_lib.find(found.folder)
    except OSError as error:
        found.problems.append(f"{found.folder}: {error.strerror or error}.")
    _describe_manifest(found)


def _compare_index(found: Inspection) -> None:
    total = found.listing.index_bytes
    if total is None or not found.has_all_forms:
        return
    stored = sum(info.nbytes for info in found.listing.tensors.values() if info is not None)
    if stored != total:
        found.notes.append(f"The index counts {total:,} bytes; its tensors have {stored:,}.")


def _describe_manifest(found: Inspection) -> None:
    place = found.listing.folder
    if not isinstance(place, LocalFolder):
        found.checksums = "looked for on disks only"
        return
    try:
        known, wrong = manifest.glance(place.path)
    except FileNotFoundError:
        found.checksums = f"none; `hybrid-jax verify {found.folder} --write-manifest` makes one"
        if found.listing.container == listing_lib.RUN:
            found.checksums = "none: the checkpoint was not finished"
        return
    except manifest.Damaged as error:
        found.checksums = "damaged"
        found.problems.append(str(error))
        return
    found.checksums = (
        f"written as {known.name!r}: {len(known.files):,} files, {len(known.arrays):,} arrays"
    )
    wrong += _other_forms(known, found.listing)
    if wrong:
        found.problems.append(f"{place} is not what its manifest says: {digests.listed(wrong)}.")


def _other_forms(known: manifest.Manifest, found: listing_lib.Listing) -> list[str]:
    """Arrays whose shape or dtype is not that of the manifest."""
    wrong = []
    for name, info in found.tensors.items():
        array = known.arrays.get(name)
        if info is None or array is None:
            continue
        here = info.shape, str(DTYPES[info.dtype])
        if here != (array.shape, array.dtype):
            wrong.append(
                f"{name} is {here[1]}{list(here[0])}, not {array.dtype}{list(array.shape)}"
            )
    return wrong
