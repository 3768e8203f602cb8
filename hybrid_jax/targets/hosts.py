"""How chips come: shapes of TPU slices, and the hosts that chips sit in, as clouds offer them."""

import dataclasses
import math
import re

from hybrid_jax.targets import chips as chips_lib

# Two sides: https://cloud.google.com/tpu/docs/v6e and /v5e, "Supported configurations".
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Three sides: these, and above them whole cubes of 4x4x4 in ascending order of sides.
# https://cloud.google.com/tpu/docs/v5p (largest job: 96 cubes); for v4 and tpu7x the limits of
# https://github.com/AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py (367c8382).
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CUBES = {"v4": 64, "v5p": 96, "tpu7x": 144}
_FLAT_CHIPS = ("v5e", "v6e")
# Hosts of a slice of several have 4 chips, as the same sources say (v5e and v6e are also sold as
# single hosts of 8). HGX boards and the cloud machines made of them have 8 GPUs.
_CHIPS_A_HOST = {"tpu": 4, "cuda": 8}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips behind one fast network, and the hosts they sit in; one process runs on each host."""

    chip: chips_lib.Chip
    topology: str
    """Sides in chips for TPUs, as in "8x8x8"; a number for GPUs."""
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


def parse_slice(target: str) -> Slice:
    """The slice that "v5p:8x8x8" or "h200:16" means.

    ValueError if there is no such chip, nobody offers such a shape, or hosts would not be full.
    """
    chip, topology = chips_lib.parse(target)
    if chip.platform == "cuda":
        if not re.fullmatch("[1-9][0-9]*", topology):
            raise ValueError(
                f"{target!r}: {chip.name} comes by the number, as in {chip.name}:8; got "
                f"{topology!r}."
            )
        count = int(topology)
    else:
        count = math.prod(_sides(target, chip, topology))
    full = _CHIPS_A_HOST[chip.platform]
    if count > full and count % full:
        raise ValueError(
            f"{target!r}: {count} chips do not fill hosts of {full}. Ask for at most {full}, or "
            f"for a multiple of it: {count // full * full} or {(count // full + 1) * full}."
        )
    return Slice(chip, topology, count, hosts=math.ceil(count / full))


def shapes(chip: chips_lib.Chip, chips: int) -> list[str]:
    """Every topology of a TPU with this many chips that is offered."""
    if chip.name in _FLAT_CHIPS:
        return [shape for shape in _FLAT if math.prod(_numbers(shape)) == chips]
    small = [shape for shape in _BELOW_A_CUBE if math.prod(_numbers(shape)) == chips]
    cubes, rest = divmod(chips, 64)
    if rest or cubes > _MOST_CUBES[chip.name]:
        return small
    return small + [
        f"{4 * a}x{4 * b}x{4 * c}"
        for a in range(1, cubes + 1)
        for b in range(a, cubes // a + 1)
        for c in [cubes // (a * b)]
        if a * b * c == cubes and c >= b
    ]


def _numbers(topology: str) -> list[int]:
    return [int(side) for side in topology.split("x")]


def _sides(target: str, chip: chips_lib.Chip, topology: str) -> list[int]:
    number = 2 if chip.name in _FLAT_CHIPS else 3
    if not re.fullmatch(rf"[1-9][0-9]*(x[1-9][0-9]*){{{number - 1}}}", topology):
        raise ValueError(
            f"{target!r}: slices of {chip.name} have {number} sides, as in "
            f"{chip.name}:{'x'.join('8' * number)}; got {topology!r}."
        )
    sides = _numbers(topology)
    if topology in shapes(chip, math.prod(sides)):
        return sides
    if number == 2:
        raise ValueError(
            f"{target!r}: {chip.name} is not offered as {topology}; expected one of "
            f"{', '.join(_FLAT)}."
        )
    raise ValueError(
        f"{target!r}: {chip.name} is not offered as {topology}; expected one of "
        f"{', '.join(_BELOW_A_CUBE)}, or three multiples of 4 in ascending order, of at most "
        f"{64 * _MOST_CUBES[chip.name]} chips together, as in 4x8x8."
    )
