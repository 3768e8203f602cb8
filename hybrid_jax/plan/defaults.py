"""A mesh, rules and a batch to begin with, for a model, a number of devices and a step."""

import math
from typing import NamedTuple

from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig

# Above this a row is split over devices; below it, a device takes whole rows.
LONG = 65_536


class Layout(NamedTuple):
    """How a step is spread."""

    mesh: str
    rules: str
    batch: int


def default_layout(config: ModelConfig, devices: int, step: str, seq: int) -> Layout:
    """Experts over up to eight devices, parameters over the rest; long rows over `sequence`.

    One row of a training batch a device. Serving splits heads and experts' widths over all.
    """
    if step not in ("train", "rl"):
        return _serving(config, devices, step)
    experts = _experts(config)
    expert = _largest_divisor(min(8, devices), experts, devices) if experts else 1
    if seq >= LONG:
        sequence = _largest_divisor(min(64, devices // expert), seq, devices // expert)
        fsdp = devices // (expert * sequence)
        mesh = {"fsdp": fsdp, "expert": expert, "sequence": sequence}
        return Layout(_text(mesh), "long_context", max(1, fsdp * expert))
    mesh = {"fsdp": devices // expert, "expert": expert}
    return Layout(_text(mesh), "expert" if expert > 1 else "fsdp", devices)


def _serving(config: ModelConfig, devices: int, step: str) -> Layout:
    heads = math.gcd(
        *(getattr(layer.mixer, "num_kv_heads", layer.mixer.num_heads) for layer in config.layers)
    )
    tensor = _largest_divisor(devices, heads, devices)
    mesh = {"data": devices // tensor, "tensor": tensor}
    batch = devices // tensor * (1 if step == "prefill" else 32)
    return Layout(_text(mesh), "serve", batch)


def _experts(config: ModelConfig) -> int:
    """What divides the experts of every layer; 0 for a dense model."""
    return math.gcd(
        *(layer.ffn.num_experts for layer in config.layers if isinstance(layer.ffn, layers.MoeFfn))
    )


def _largest_divisor(limit: int, *numbers: int) -> int:
    """The largest number up to `limit` that divides all of them."""
    common = math.gcd(*numbers)
    return max(size for size in range(1, limit + 1) if common % size == 0)


def _text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
