"""A checkpoint directory of any kind, opened and understood."""

import contextlib
import dataclasses
import pathlib

import numpy as np

from hybrid_jax.checkpoint import finite, fp8, hf_config, leaves
from hybrid_jax.checkpoint.formats import orbax, protocol, training_run
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.merged import Merged
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

    path: pathlib.Path
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters of our tree that it fills, by name."""
        return leaves.shapes(self.config)

    def read_leaf(self, leaf: str, shape, dtype: np.dtype, check_finite: bool = True):
        """One parameter of our tree: an array put together from all tensors that hold a part."""
        by_name = {rule.name: rule for rule in self.rules.values() if rule.leaf == leaf}
        array = np.empty(shape, dtype)
        for name, stored in self.read(by_name, dequantize=True, check_finite=check_finite):
            rule = by_name[name]
            array[rule.slices()] = rule.to_block(stored).astype(dtype)
        return array

    def _check(self, name: str, array: np.ndarray, check_finite: bool) -> None:
        if check_finite:
            finite.check(array, name, self.source.locate(name))


@contextlib.contextmanager
def open_checkpoint(path, step: int | None = None):
    """The checkpoint in a directory: Hugging Face, Orbax as written here, or a training run.

    Of a run it is that of `step`, or the newest good one; what LoRA learnt is merged in.
    ValueError names the file, field or tensor that is missing, extra, of a wrong shape or dtype.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected a checkpoint directory.")
    if orbax.is_orbax(path):
        directory = orbax.OrbaxDirectory(path)
        source: protocol.Source = directory
        understand = {"published": _published, "tree": _own}[directory.vocabulary]
    elif training_run.is_training_run(path):
        source, understand = training_run.TrainingRun(path, step), _run
    elif (path / CONFIG_JSON).is_file() or list(path.glob("*.safetensors*")):
        understand = _published
        # The config first: without it no tensor has a meaning.
        hf_config.read_json(path / CONFIG_JSON)
        source = HfDirectory(path)
    else:
        raise ValueError(
            f"{path} is no checkpoint: expected config.json with safetensors files (Hugging Face), "
            f"{orbax.INDEX_NAME} with Orbax weights, or the directory of a training run."
        )
    if step is not None and understand is not _run:
        raise ValueError(f"{path} is one checkpoint and no run: it has no step {step} to choose.")
    with contextlib.closing(source):
        yield understand(path, source)


def _published(path: pathlib.Path, source) -> Checkpoint:
    where = path / CONFIG_JSON
    description = hf_config.describe(hf_config.read_json(where), str(where))
    config, stored = description.model, source.tensors
    block = fp8.block_size(description.json, str(where))
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
    checkpoint = Checkpoint(path, config, description, source, rules, scales, derived, block)
    _check_names(checkpoint)
    for name, rule in rules.items():
        _check_weight(checkpoint, stored[name], rule)
    return checkpoint


def _own(path: pathlib.Path, source) -> Checkpoint:
    config = text.read_yaml(model_lib.ModelConfig, path / CONFIG_YAML)
    return _of_rules(path, source, config, tree.rules(config, leaves.shapes(config)))


def _run(path: pathlib.Path, source) -> Checkpoint:
    run, step = text.read_yaml(TrainConfig, path / CONFIG_YAML), source.step
    config = run.model
    if isinstance(run.tuning, LoRA):
        source = Merged(source, run.tuning.scale)
    whole = [Rule(leaf, shape, leaf) for leaf, shape in leaves.shapes(config).items()]
    return dataclasses.replace(_of_rules(path, source, config, whole), step=step)


def _of_rules(path: pathlib.Path, source, config: model_lib.ModelConfig, rules) -> Checkpoint:
    by_name = {rule.name: rule for rule in rules}
    checkpoint = Checkpoint(path, config, None, source, by_name, {}, [], None)
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
            f"{checkpoint.path} lacks {len(missing)} tensors that its config asks for, first "
            f"{missing[0]!r}.{near}"
        )
    extra = [name for name in stored if name not in known]
    if extra:
        raise ValueError(
            f"{checkpoint.source.locate(extra[0])} holds {extra[0]!r}, which the model of "
            f"{checkpoint.path} has no place for ({len(extra)} such tensors in all)."
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
