"""What stored tensors mean for a model, and which are missing, unknown or of another form."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from hybrid_jax.checkpoint import fp8
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.hf_config import Description
from hybrid_jax.checkpoint.names import folding, minimax
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.config import text

# By name; None where an index alone names a tensor, so that its shape and dtype are not known.
Stored = Mapping[str, TensorInfo | None]

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Match:
    """Every stored tensor is in one of `rules`, `scales`, `derived`, `vision` and `unknown`."""

    rules: dict[str, Rule]
    """Weights that the model asks for, by stored name."""
    scales: dict[str, str]
    """FP8 weight -> its scale."""
    derived: list[str]
    """Known tensors that are not weights."""
    vision: list[str]
    """Weights of a vision part, which nothing here computes."""
    missing: list[str]
    """Asked for and not stored, weights and scales."""
    unknown: list[str]
    """Stored, and the model has no place for them."""
    wrong: dict[str, str]
    """Name -> what is wrong with shape, dtype or scale: the rest of a sentence."""

    def problems(self) -> list[str]:
        """One sentence for each kind of thing that does not fit."""
        said = []
        if self.missing:
            near = text.near_names(self.missing[0], self.unknown)
            said.append(f"{len(self.missing)} tensors are missing: {_listed(self.missing)}.{near}")
        if self.unknown:
            said.append(
                f"{len(self.unknown)} tensors have no place in the model: {_listed(self.unknown)}."
            )
        if self.wrong:
            first, *others = self.wrong
            more = f" {len(others)} more are wrong: {_listed(others)}." if others else ""
            said.append(f"The tensor {first!r} {self.wrong[first]}.{more}")
        return said

    def require(self, path, locate: Callable[[str], str]) -> None:
        """ValueError for the first thing that does not fit; `locate` gives a tensor's file."""
        if self.missing:
            near = text.near_names(self.missing[0], self.unknown)
            raise ValueError(
                f"{path} lacks {len(self.missing)} tensors that its config asks for, first "
                f"{self.missing[0]!r}.{near}"
            )
        if self.unknown:
            raise ValueError(
                f"{locate(self.unknown[0])} holds {self.unknown[0]!r}, which the model of {path} "
                f"has no place for ({len(self.unknown)} such tensors in all)."
                f"{text.near_names(self.unknown[0], self.rules)}"
            )
        for name, what in self.wrong.items():
            raise ValueError(f"{locate(name)}: tensor {name!r} {what}.")


def published(description: Description, stored: Stored, where: str) -> Match:
    """Published names against the model of a config.json, which `where` names in messages.

    ValueError if the model has no published names, or the file names an unknown quantisation.
    """
    config, prefix = description.model, description.prefix
    block = fp8.block_size(description.json, where)
    bare = {name.removeprefix(prefix) for name in stored}
    rules = {rule.name: rule for rule in minimax.rules(config, bare, prefix)}
    scales = {
        name: name + fp8.SCALE_SUFFIX
        for name, rule in rules.items()
        if _has_scale(rule, stored, block, description.json)
    }
    used = {*rules, *scales.values()}
    rest = [name for name in stored if name not in used]
    derived = [
        name
        for name in rest
        if minimax.is_derived(
            name.removeprefix(prefix),
            config.num_layers,
            may_have_extra_layers=description.may_have_extra_layers,
        )
    ]
    vision = [name for name in rest if prefix and minimax.is_vision(name)]
    return _compared(rules, scales, derived, vision, stored, block)


def of_rules(rules: Iterable[Rule], stored: Stored) -> Match:
    """Names of our own against the rules of a model."""
    return _compared({rule.name: rule for rule in rules}, {}, [], [], stored, None)


def _has_scale(rule: Rule, stored: Stored, block, json: dict) -> bool:
    """Whether a weight is in FP8; without its dtype, whether it should be."""
    name, info = rule.name, stored.get(rule.name)
    if info is not None:
        return info.dtype in fp8.FP8_TAGS
    has_scale = name + fp8.SCALE_SUFFIX in stored and len(rule.shape) == 2
    if name not in stored or block is None:
        return has_scale
    return has_scale or (minimax.is_linear(name) and not fp8.is_excluded(name, json))


def _compared(rules, scales, derived, vision, stored: Stored, block) -> Match:
    known = {*rules, *scales.values(), *derived, *vision}
    wrong = {}
    for name, rule in rules.items():
        info = stored.get(name)
        what = None if info is None else _wrong(info, rule, scales, stored, block)
        if what is not None:
            wrong[name] = what
    return Match(
        rules,
        scales,
        derived,
        vision,
        missing=[name for name in (*rules, *scales.values()) if name not in stored],
        unknown=[name for name in stored if name not in known],
        wrong=wrong,
    )


def _wrong(info: TensorInfo, rule: Rule, scales, stored: Stored, block) -> str | None:
    if info.shape != rule.shape:
        return f"has shape {list(info.shape)}; the config asks for {list(rule.shape)}"
    if info.dtype not in _FLOATS:
        return f"is stored as {info.dtype}; weights must be one of {', '.join(_FLOATS)}"
    if info.name not in scales:
        return None
    if block is None:
        return f"is stored as {info.dtype}, but config.json has no quantization_config"
    if len(info.shape) != 2:
        return f"is stored as {info.dtype}, but has not two dims"
    scale, expected = stored.get(scales[info.name]), fp8.scale_shape(info, block)
    if scale is not None and (scale.shape != expected or scale.dtype not in _SCALES):
        return (
            f"has the scale {scale.name!r}, {scale.dtype}{list(scale.shape)}; expected "
            f"F32{list(expected)} for blocks of {list(block)}"
        )
    return None


def _listed(names: list[str]) -> str:
    """The names, folded to patterns where many are alike."""
    patterns = [folded.pattern for folded in folding.fold(names)]
    more = f" and {len(patterns) - 8} more kinds" if len(patterns) > 8 else ""
    return ", ".join(patterns[:8]) + more
