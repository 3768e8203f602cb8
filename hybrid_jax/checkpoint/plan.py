"""What a converted checkpoint will hold and what each of its tensors is made from."""

import dataclasses

import numpy as np

from hybrid_jax.checkpoint import decay_tables, fp8, hf_config, leaves
from hybrid_jax.checkpoint.formats.protocol import DTYPES, TensorInfo
from hybrid_jax.checkpoint.hf_config.native import BLOCK_SIZE
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.checkpoint.opened import Checkpoint

DTYPE_TAGS = {"float32": "F32", "bfloat16": "BF16"}
FP8 = "fp8"
NO_SCALES = "Scales have names in published vocabularies only: choose `hf` or `hf-original`."
DTYPES_TO = (*DTYPE_TAGS, FP8)


@dataclasses.dataclass(frozen=True)
class Output:
    """One tensor to write; `rule` is set if it is cut out of the stored one rather than copied."""

    info: TensorInfo
    rule: Rule | None = None
    quantized: str | None = None
    """`values` or `scales`: in FP8 blocks, and which half of them this is."""

    def make(self, array: np.ndarray, stored_rule: Rule | None) -> np.ndarray:
        """The tensor out of the stored array."""
        if self.rule is not None and stored_rule is not None:
            block = stored_rule.cut(stored_rule.to_block(array), self.rule)
            array = self.rule.from_block(block)
        if self.quantized is not None:
            try:
                values, scales = fp8.quantize(array)
            except ValueError as error:
                raise ValueError(f"Tensor {self.info.name!r}: {error}") from error
            return values if self.quantized == "values" else scales
        return array.astype(DTYPES[self.info.dtype], copy=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stored tensors and what comes out of each, and decay tables that no stored tensor holds."""

    outputs: dict[str, list[Output]]
    """Stored name -> what is written from it; every stored tensor is here once or in `dropped`."""
    tables: dict[str, tuple[TensorInfo, int]]
    """Decay tables to compute: name -> (info, layer)."""
    dropped: list[str]
    """Stored names that are not written: applied FP8 scales, tables the format does not have."""
    vocabulary: str
    """`published` or `tree`."""

    @property
    def infos(self) -> list[TensorInfo]:
        """Everything written, in the order in which it comes."""
        made = [output.info for outputs in self.outputs.values() for output in outputs]
        return made + [info for info, _ in self.tables.values()]


def make(
    checkpoint: Checkpoint, format: str, dtype: str | None, *, language_only: bool = False
) -> Plan:
    """Plan a conversion to a format of `convert`; `dtype` None keeps what is stored.

    `fp8` makes blocks and scales of the matrices of layers, and bfloat16 of the rest.
    A vision part, which nothing here computes, is left out if `language_only`; else ValueError.
    """
    if checkpoint.vision and not language_only:
        raise ValueError(
            f"{checkpoint.folder} has {len(checkpoint.vision)} tensors of a vision part, first "
            f"{checkpoint.vision[0]!r}, which nothing here computes or carries. `hybrid-jax "
            "convert --language-only` leaves them out."
        )
    described = checkpoint.description
    if dtype == FP8:
        _check_fp8(checkpoint, format)
    dropped = list(checkpoint.scales.values()) if dtype else []
    dropped += checkpoint.vision
    names, derived = _names(checkpoint, format), set(checkpoint.derived)
    if format not in ("orbax", "hf"):
        prefix = hf_config.prefix(format)
        bare = {name: names[name].removeprefix(prefix) for name in checkpoint.derived}
        dropped += [name for name in bare if minimax.is_decay_buffer(bare[name])]
    # A set: M2 drops 47,864 scales of 96,103 tensors.
    left = set(checkpoint.source.tensors) - set(dropped)
    copies = {}
    for stored in checkpoint.source.tensors.values():
        if stored.name in left:
            info = dataclasses.replace(stored, name=names[stored.name])
            copied = [Output(info)] if stored.name in derived else cast(info, dtype)
            copies[stored.name] = copied
    if format == "orbax":
        _check_not_empty(copies)
    targets = _targets(checkpoint, format, names)
    outputs = copies
    if any(names[name] not in targets for name in checkpoint.rules):
        outputs = _recut(checkpoint, copies, targets, names, dtype)
    if format == "orbax":
        return Plan(outputs, {}, dropped, "tree" if described is None else "published")
    tables = {}
    if format == "hf":
        block_size = described.block_size if described is not None else BLOCK_SIZE
        tables = decay_tables.infos(checkpoint.config, block_size)
        there = {names[name] for name in derived}
        tables = {name: table for name, table in tables.items() if name not in there}
    return Plan(outputs, tables, dropped, "published")


def _names(checkpoint: Checkpoint, format: str) -> dict[str, str]:
    """Stored name -> the same with the prefix of the format."""
    before = "" if checkpoint.description is None else checkpoint.description.prefix
    after = before if format == "orbax" else hf_config.prefix(format)
    return {name: after + name.removeprefix(before) for name in checkpoint.source.tensors}


def _targets(checkpoint: Checkpoint, format: str, names: dict[str, str]) -> dict[str, Rule]:
    config = checkpoint.config
    if format == "orbax":
        # Published names stay as they are; a training run's stacks are cut into layers.
        if checkpoint.description is not None:
            return checkpoint.rules
        return {rule.name: rule for rule in tree.rules(config, leaves.shapes(config))}
    # `hf` keeps the spelling that is stored: transformers reads each of them.
    stored = set(names.values()) if format == "hf" else ()
    rules = minimax.rules(config, stored, hf_config.prefix(format))
    return {rule.name: rule for rule in rules}


def _recut(checkpoint, copies, targets, names, dtype) -> dict[str, list[Output]]:
    """Weights whose name differs between vocabularies, each cut from the tensor that covers it."""
    by_place: dict = {}
    for rule in checkpoint.rules.values():
        by_place.setdefault((rule.leaf, rule.index[:2]), []).append(rule)
    outputs = {name: value for name, value in copies.items() if name not in checkpoint.rules}
    outputs |= {name: [] for name in checkpoint.rules}
    for target in targets.values():
        near = [
            *by_place.get((target.leaf, target.index[:2]), ()),
            *by_place.get((target.leaf, ()), ()),
        ]
        covering = [rule for rule in near if rule.covers(target)]
        if not covering:
            raise ValueError(
                f"{checkpoint.folder} has no single tensor that holds {target.name!r} of the "
                "released vocabulary. Convert to `hf` or `orbax` instead."
            )
        stored = checkpoint.source.tensors[covering[0].name]
        info = TensorInfo(target.name, stored.dtype, target.shape)
        same = names[stored.name] == target.name
        if not same and stored.name in checkpoint.scales and dtype is None:
            raise ValueError(
                f"{stored.name!r} is stored in FP8 and has to be cut into {target.name!r}, which "
                "its scales do not follow. Give a dtype (--dtype bfloat16)."
            )
        outputs[stored.name] += cast(info, dtype, None if same else target)
    # In the order in which reading is cheapest.
    return {name: outputs[name] for name in checkpoint.source.tensors if name in outputs}


def _check_not_empty(copies: dict[str, list[Output]]) -> None:
    for name, (output, *_) in copies.items():
        if 0 in output.info.shape:
            raise ValueError(
                f"Tensor {name!r} of shape {list(output.info.shape)} has no values, and Orbax "
                "cannot hold it. Convert to `hf` or `hf-original` instead."
            )


def _check_fp8(checkpoint: Checkpoint, format: str) -> None:
    if checkpoint.scales:
        raise ValueError(
            f"{checkpoint.folder} is in FP8 already. Without --dtype its blocks are kept."
        )
    if format == "orbax" and checkpoint.description is None:
        raise ValueError(NO_SCALES)


def cast(info: TensorInfo, dtype: str | None, rule: Rule | None = None) -> list[Output]:
    """What becomes of one tensor in another dtype: itself, or a matrix in blocks and its scales."""
    is_float = info.dtype.startswith(("F", "BF"))
    if dtype is None or not is_float:
        return [Output(info, rule)]
    if dtype == FP8 and minimax.is_linear(info.name):
        weight = dataclasses.replace(info, dtype="F8_E4M3")
        scale = TensorInfo(info.name + fp8.SCALE_SUFFIX, "F32", fp8.scale_shape(info, fp8.BLOCK))
        return [Output(weight, rule, "values"), Output(scale, rule, "scales")]
    keeps = info.dtype == "F32" and _is_float32(info.name)
    tag = info.dtype if keeps else DTYPE_TAGS["bfloat16" if dtype == FP8 else dtype]
    return [Output(dataclasses.replace(info, dtype=tag), rule)]


def _is_float32(name: str) -> bool:
    return minimax.is_float32(name) or name.endswith((".ffn.router", ".ffn.correction_bias"))
