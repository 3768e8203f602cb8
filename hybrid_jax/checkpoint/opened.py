"""A checkpoint directory of any kind, opened and understood."""

import contextlib
import dataclasses
import functools
import pathlib

import numpy as np

from hybrid_jax.checkpoint import finite, fp8, hf_config, leaves, parts
from hybrid_jax.checkpoint.formats import orbax, protocol, training_run
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.hf_directory import SUFFIX, HfDirectory
from hybrid_jax.checkpoint.formats.merged import Merged
from hybrid_jax.checkpoint.formats.remote import RemoteFolder, is_remote
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.config.tuning import LoRA

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclasses.dataclass
class Checkpoint:
    """Every stored tensor is in exactly one of `rules`, `scales` and `derived`."""

    folder: Folder
    """Where it lies; for messages, and for the other files in it."""
    config: model_lib.ModelConfig
    description: hf_config.Description | None
    """config.json, for published names."""
    source: protocol.Source
    rules: dict[str, Rule]
    """Weights by stored name."""
    scales: dict[str, str]
    """FP8 weight -> its scale."""
    derived: list[str]
    """Known tensors that are not weights."""
    block: tuple[int, int] | None
    """Rows and columns that share an FP8 scale."""
    step: int | None = None
    """Updates that a run had done; None for what is no run."""

    def read(self, names, *, dequantize: bool, check_finite: bool = True):
        """(name, array) of stored tensors, in an order that is cheap to read.

        FP8 weights come out in float32 if `dequantize`, everything else as stored. ValueError for a
        weight that is not finite.
        """
        names = list(names)
        scales = {}
        if dequantize:
            wanted = [self.scales[name] for name in names if name in self.scales]
            for name, scale in self.source.read_many(wanted):
                self._check(name, scale, check_finite)
                scales[name] = scale
        derived = set(self.derived)
        for name, array in self.source.read_many(names):
            self._check(name, array, check_finite and name not in derived)
            if dequantize and name in self.scales and self.block is not None:
                array = fp8.dequantize(array, scales[self.scales[name]], self.block)
            yield name, array

    @property
    def path(self) -> pathlib.Path:
        """The directory; ValueError for one in object storage."""
        if not isinstance(self.folder, LocalFolder):
            raise ValueError(
                f"{self.folder} can only be loaded from where it is. For this, copy it to a disk."
            )
        return self.folder.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters of our tree that it fills, by name."""
        return leaves.shapes(self.config)

    @functools.cached_property
    def order(self) -> dict[str, int]:
        """Stored name -> its number where reading is cheapest."""
        return {name: number for number, name in enumerate(self.source.tensors)}

    @functools.cached_property
    def _rules_of(self) -> dict[str, list[Rule]]:
        found: dict[str, list[Rule]] = {}
        for rule in self.rules.values():
            found.setdefault(rule.leaf, []).append(rule)
        return found

    def rules_of(self, leaf: str) -> list[Rule]:
        """Of all tensors that hold a part of a parameter."""
        return self._rules_of[leaf]

    def read_leaf(self, leaf: str, shape, dtype: np.dtype, check_finite: bool = True):
        """One parameter of our tree: an array put together from all tensors that hold a part."""
        return parts.whole(self, leaf, shape, dtype, check_finite=check_finite)

    def _check(self, name: str, array: np.ndarray, check_finite: bool) -> None:
        if check_finite:
            finite.check(array, name, self.source.locate(name))


@contextlib.contextmanager
def open_checkpoint(path, step: int | None = None):
    """The checkpoint in a directory: Hugging Face, Orbax as written here, or a training run.

    Of a run it is that of `step`, or the newest good one; what LoRA learnt is merged in. Hugging
    Face directories may also be in object storage (`s3://...`).
    ValueError names the file, field or tensor that is missing, extra, of a wrong shape or dtype.
    """
    folder: Folder = RemoteFolder(path) if is_remote(path) else LocalFolder(path)
    local = None if is_remote(path) else _directory(path)
    source: protocol.Source
    if local is not None and orbax.is_orbax(local):
        source = directory = orbax.OrbaxDirectory(local)
        understand = {"published": _published, "tree": _own}[directory.vocabulary]
    elif local is not None and training_run.is_training_run(local):
        source, understand = training_run.TrainingRun(local, step), _run
    elif folder.has(CONFIG_JSON) or any(SUFFIX in name for name in folder.names()):
        understand = _published
        # The config first: without it no tensor has a meaning.
        hf_config.read_from(folder, CONFIG_JSON)
        source = HfDirectory(folder)
    else:
        raise ValueError(
            f"{folder} is no checkpoint: expected config.json with safetensors files (Hugging "
            f"Face) or, on a disk, {orbax.INDEX_NAME} with Orbax weights, or the directory of a "
            "training run."
        )
    with contextlib.closing(source):
        if step is not None and understand is not _run:
            raise ValueError(
                f"{folder} is one checkpoint and no run: it has no step {step} to choose."
            )
        yield understand(folder, source)


def _directory(path) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected a checkpoint directory.")
    return path


def _published(folder: Folder, source) -> Checkpoint:
    where = folder.where(CONFIG_JSON)
    description = hf_config.describe(hf_config.read_from(folder, CONFIG_JSON), where)
    config, stored = description.model, source.tensors
    block = fp8.block_size(description.json, where)
    rules = {rule.name: rule for rule in minimax.rules(config, stored)}
    derived = [
        name
        for name in stored
        if name not in rules
        and minimax.is_derived(
            name, config.num_layers, may_have_extra_layers=description.may_have_extra_layers
        )
    ]
    scales = {
        name: name + fp8.SCALE_SUFFIX
        for name in rules
        if name in stored and stored[name].dtype in fp8.FP8_TAGS
    }
    checkpoint = Checkpoint(folder, config, description, source, rules, scales, derived, block)
    _check_names(checkpoint)
    for name, rule in rules.items():
        _check_weight(checkpoint, stored[name], rule)
    return checkpoint


def _own(folder: Folder, source) -> Checkpoint:
    config = text.read_yaml(model_lib.ModelConfig, folder.where(CONFIG_YAML))
    return _of_rules(folder, source, config, tree.rules(config, leaves.shapes(config)))


def _run(folder: Folder, source) -> Checkpoint:
    run, step = text.read_yaml(TrainConfig, folder.where(CONFIG_YAML)), source.step
    config = run.model
    if isinstance(run.tuning, LoRA):
        source = Merged(source, run.tuning.scale)
    whole = [Rule(leaf, shape, leaf) for leaf, shape in leaves.shapes(config).items()]
    return dataclasses.replace(_of_rules(folder, source, config, whole), step=step)


def _of_rules(folder: Folder, source, config: model_lib.ModelConfig, rules) -> Checkpoint:
    by_name = {rule.name: rule for rule in rules}
    checkpoint = Checkpoint(folder, config, None, source, by_name, {}, [], None)
    _check_names(checkpoint)
    for name, rule in by_name.items():
        _check_weight(checkpoint, source.tensors[name], rule)
    return checkpoint


def _check_names(checkpoint: Checkpoint) -> None:
    stored = checkpoint.source.tensors
    known = set(checkpoint.rules) | set(checkpoint.scales.values()) | set(checkpoint.derived)
    missing = [
        name for name in (*checkpoint.rules, *checkpoint.scales.values()) if name not in stored
    ]
    if missing:
        near = text.near_names(missing[0], [name for name in stored if name not in known])
        raise ValueError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that its config asks for, first "
            f"{missing[0]!r}.{near}"
        )
    extra = [name for name in stored if name not in known]
    if extra:
        raise ValueError(
            f"{checkpoint.source.locate(extra[0])} holds {extra[0]!r}, which the model of "
            f"{checkpoint.folder} has no place for ({len(extra)} such tensors in all)."
            f"{text.near_names(extra[0], checkpoint.rules)}"
        )


def _check_weight(checkpoint: Checkpoint, info: protocol.TensorInfo, rule: Rule) -> None:
    where = checkpoint.source.locate(info.name)
    if info.shape != rule.shape:
        raise ValueError(
            f"{where}: tensor {info.name!r} has shape {list(info.shape)}; the config asks for "
            f"{list(rule.shape)}."
        )
    if info.dtype not in _FLOATS:
        raise ValueError(
            f"{where}: tensor {info.name!r} is stored as {info.dtype}; weights must be one of "
            f"{', '.join(_FLOATS)}."
        )
    if info.name not in checkpoint.scales:
        return
    scale = checkpoint.source.tensors[checkpoint.scales[info.name]]
    if checkpoint.block is None or len(info.shape) != 2:
        raise ValueError(
            f"{where}: tensor {info.name!r} is stored as {info.dtype}, but "
            + (
                "config.json has no quantization_config."
                if checkpoint.block is None
                else "has not two dims."
            )
        )
    expected = fp8.scale_shape(info, checkpoint.block)
    if scale.shape != expected or scale.dtype not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"{where}: the scale {scale.name!r} is {scale.dtype}{list(scale.shape)}; expected "
            f"F32{list(expected)} for blocks of {list(checkpoint.block)}."
        )
