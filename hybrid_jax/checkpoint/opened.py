"""A checkpoint directory of any kind, opened and understood."""

import contextlib
import dataclasses
import functools
import warnings

import numpy as np

from hybrid_jax.checkpoint import finite, fp8, hf_config, leaves, matching
from hybrid_jax.checkpoint.formats import folders, orbax, protocol, training_run
from hybrid_jax.checkpoint.formats.files import Folder, LocalFolder
from hybrid_jax.checkpoint.formats.hf_directory import SUFFIX, HfDirectory
from hybrid_jax.checkpoint.formats.merged import Merged
from hybrid_jax.checkpoint.names import tree
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.sidecars import CONFIG_JSON, CONFIG_YAML
from hybrid_jax.config import model as model_lib
from hybrid_jax.config import text
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.config.tuning import LoRA


@dataclasses.dataclass
class Checkpoint:
    """Every stored tensor is in exactly one of `rules`, `scales`, `derived` and `vision`."""

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
    vision: list[str]
    """Weights of a vision part, which nothing here computes."""
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
    folder = folders.at(path)
    local = folder.path if isinstance(folder, LocalFolder) else None
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


def _published(folder: Folder, source) -> Checkpoint:
    where = folder.where(CONFIG_JSON)
    description = hf_config.describe(hf_config.read_from(folder, CONFIG_JSON), where)
    match = matching.published(description, source.tensors, where)
    block = fp8.block_size(description.json, where)
    match.require(folder, source.locate)
    if match.vision:
        warnings.warn(
            f"{folder}: {len(match.vision)} tensors of its vision part, first {match.vision[0]!r}, "
            "are not read: nothing here computes them.",
            stacklevel=2,
        )
    return Checkpoint(
        folder,
        description.model,
        description,
        source,
        match.rules,
        match.scales,
        match.derived,
        match.vision,
        block,
    )


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
    match = matching.of_rules(rules, source.tensors)
    match.require(folder, source.locate)
    return Checkpoint(folder, config, None, source, match.rules, {}, [], [], None)
