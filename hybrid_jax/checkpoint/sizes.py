"""How large a model and its stored tensors are: numbers, bytes, and where they lie in the model."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from hybrid_jax.checkpoint import fp8
from hybrid_jax.checkpoint.formats.protocol import TensorInfo
from hybrid_jax.checkpoint.hf_config import Description
from hybrid_jax.checkpoint.matching import Match
from hybrid_jax.checkpoint.names import minimax
from hybrid_jax.checkpoint.names.places import places
from hybrid_jax.checkpoint.names.rules import Rule
from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig

_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MIXERS = {layers.LightningAttention: "lightning", layers.SoftmaxAttention: "softmax"}


def parameters(config: ModelConfig, rules: Iterable[Rule]) -> tuple[int, int]:
    """(numbers in all, numbers that a token meets): of E experts it meets A."""
    shares: dict[str, tuple[int, int]] = {}
    for place in places(config):
        ffn = place.layer.ffn
        if isinstance(ffn, layers.MoeFfn):
            share = ffn.router.experts_per_token, ffn.num_experts
            shares |= {f"{place.prefix}.ffn.{part}": share for part in ("gate_up", "down")}
    counts: dict[tuple[int, int], int] = {}
    for rule in rules:
        share = shares.get(rule.leaf, (1, 1))
        counts[share] = counts.get(share, 0) + math.prod(rule.shape)
    # Rules tile their leaves, so that the sum over all experts divides.
    active = sum(count * chosen // of for (chosen, of), count in counts.items())
    return sum(counts.values()), active


def assumed(match: Match, description: Description | None, *, narrow_routers: bool = False):
    """Name -> TensorInfo of what a config asks for, as the releases store it.

    Weights have the config's dtype (bfloat16 if it names none), routers float32 unless
    `narrow_routers`; what should be in FP8 is, with float32 scales.
    """
    json = {} if description is None else description.language
    main = _TAGS.get(json.get("torch_dtype") or json.get("dtype") or "bfloat16", "BF16")
    found = {}
    for name, rule in match.rules.items():
        wide = minimax.is_float32(name) and not narrow_routers
        tag = "F8_E4M3" if name in match.scales else "F32" if wide else main
        found[name] = TensorInfo(name, tag, rule.shape)
    block = None if description is None else fp8.block_size(description.json, "config.json")
    if block is not None:
        for name, scale in match.scales.items():
            if name in match.rules:
                found[scale] = TensorInfo(scale, "F32", fp8.scale_shape(found[name], block))
    return found


def compare_total(match: Match, description: Description, total: int) -> str:
    """What the index's `metadata.total_size` says beside what the config asks for."""
    if match.derived or match.vision:
        return f"The index counts {total:,} bytes, with tensors whose size the config does not say."
    sums = {}
    for narrow, text in ((False, "routers in float32"), (True, "routers like all else")):
        infos = assumed(match, description, narrow_routers=narrow)
        sums[text] = sum(info.nbytes for info in infos.values())
        if sums[text] == total:
            return f"The index counts {total:,} bytes, as the config asks for ({text})."
    wanted = next(iter(sums.values()))
    return (
        f"The index counts {total:,} bytes, not the {wanted:,} of this config in its dtype: other "
        "dtypes, other shapes, or a wrong index."
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of one kind of tensors in one layer, or outside all layers (None)."""

    name: str
    layer: int | None
    bytes: int


def parts(
    config: ModelConfig | None, match: Match, infos: Mapping[str, TensorInfo | None]
) -> list[Part]:
    """Bytes by kind and layer; stacks of a training run are dealt out to their layers.

    Tensors that are None in `infos` are left out.
    """
    layers_of: dict[str, list[int]] = {}
    kinds = {}
    for place in () if config is None else places(config):
        layers_of.setdefault(place.prefix, []).append(place.layer_idx)
        kinds[place.prefix] = _MIXERS[type(place.layer.mixer)]
    names = {scale: weight for weight, scale in match.scales.items()}
    others = {name: "derived" for name in match.derived} | dict.fromkeys(match.vision, "vision")
    sums: dict[tuple[str, int | None], float] = {}
    for name, info in infos.items():
        if info is None:
            continue
        rule = match.rules.get(names.get(name, name))
        kind = others.get(name, "unknown") if rule is None else _kind(rule.leaf, kinds)
        layer = _LAYER.search(name)
        if layer is not None and kind != "vision":
            where: list = [int(layer.group(1))]
        else:
            prefix = "" if rule is None else ".".join(rule.leaf.split(".")[:3])
            where = layers_of.get(prefix, [None])
        for each in where:
            key = kind, each
            sums[key] = sums.get(key, 0) + info.nbytes / len(where)
    return [Part(name, layer, round(count)) for (name, layer), count in sums.items()]


def _kind(leaf: str, mixers: Mapping[str, str]) -> str:
    prefix = ".".join(leaf.split(".")[:3])
    for mark, name in (
        ("embedding.", "embedding"),
        ("head.", "head"),
        (".mixer.", f"{mixers.get(prefix, '')} attention"),
        (".ffn.router", "router"),
        (".ffn.correction_bias", "router"),
        (".ffn.", "experts"),
    ):
        if mark in leaf:
            return name
    return "norms"
