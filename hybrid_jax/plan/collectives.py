"""Collectives of a program: what kind, how many bytes, and over which axes of the mesh."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from hybrid_jax.plan import hlo

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective as a device takes part in it."""

    kind: str
    size: int
    """Bytes; see `network.Network.seconds`."""
    group: tuple[int, ...]
    """Devices that one group holds, by their number in the program."""
    channel: str


def kind_of(opcode: str) -> str | None:
    """The kind, with or without -start; None for what is no collective, or the end of one."""
    bare = opcode.removesuffix("-start")
    return bare if bare in KINDS else None


def inside(
    program: hlo.Program, computation: str, instruction: hlo.Instruction, devices: int
) -> Iterator[Collective]:
    """The collectives an instruction stands for: itself, or those in the fusion it calls."""
    if kind := kind_of(instruction.opcode):
        yield _read(program, computation, instruction, kind, devices)
    elif instruction.opcode in ("fusion", "async-start", "call-start"):
        for called in instruction.called:
            yield from _within(program, called, devices)


def _within(program: hlo.Program, computation: str, devices: int) -> Iterator[Collective]:
    for each in program.computations.get(computation, ()):
        if kind := kind_of(each.opcode):
            # A sum of which a part is kept, in one fusion.
            if kind == "all-reduce" and "reduce-scatter" in computation:
                kind = "reduce-scatter"
            yield _read(program, computation, each, kind, devices)
        for called in each.called if each.opcode in ("fusion", "call", "call-start") else ():
            yield from _within(program, called, devices)


def _read(program: hlo.Program, computation, instruction, kind: str, devices: int) -> Collective:
    operands = program.operand_bytes(computation, instruction)
    if kind == "ragged-all-to-all":
        # Sent are the rows there are; one of the two buffers holds these, the other the worst case.
        size = min(operands[:2])
        kind = "all-to-all"
    elif kind == "all-gather":
        group = _group(instruction, devices)
        size = sum(operands) * len(group)
    else:
        size = sum(operands)
    channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
    return Collective(kind, size, _group(instruction, devices), channel)


def _group(instruction: hlo.Instruction, devices: int) -> tuple[int, ...]:
    """The devices of the first group of more than one."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _chain(re.findall(r"\{(\d+),(\d+)", pairs[1] + "}"))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        groups = [
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
        return max(groups, key=len)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(int(iota[2]), _numbers(iota[3]), _numbers(iota[4]) if iota[4] else None)
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    if mesh := re.search(rf"replica_groups=mesh\[(.*?)\]{order}\s*\{{(.*?)\}}", text):
        group = _mesh(mesh[1], mesh[4])
        if mesh[2]:
            numbers = _iota(devices, _numbers(mesh[2]), _numbers(mesh[3]))
            group = tuple(numbers[at] for at in group)
        return group
    if unknown := re.search(r"replica_groups=(?!\{\}).{0,80}", text):
        raise ValueError(f"The groups of a collective are written in an unknown way: {unknown[0]}")
    return tuple(range(devices))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _iota(group_size: int, shape: Sequence[int], order: Sequence[int] | None) -> tuple[int, ...]:
    """First group of the devices 0, 1, ... in `shape`, transposed, cut into groups of a size."""
    order = order or range(len(shape))
    strides = _strides(shape)
    sizes = [shape[dim] for dim in order]
    steps = [strides[dim] for dim in order]
    return tuple(_at(number, sizes, steps) for number in range(group_size))


def _mesh(sizes_text: str, axes_text: str) -> tuple[int, ...]:
    """First group over some axes of a mesh whose devices are numbered in order."""
    named = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes_text)]
    strides = _strides([size for _, size in named])
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes_text)
    sizes, steps = [], []
    for name, before, part in chosen:
        at = [known for known, _ in named].index(name)
        size = named[at][1]
        if part:
            # A part of an axis: `part` devices, with `before` parts above them.
            sizes.append(int(part))
            steps.append(strides[at] * size // (int(before) * int(part)))
        else:
            sizes.append(size)
            steps.append(strides[at])
    return tuple(_at(number, sizes, steps) for number in range(math.prod(sizes)))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _at(number: int, sizes: Sequence[int], steps: Sequence[int]) -> int:
    total = 0
    for size, step in zip(reversed(sizes), reversed(steps)):
        total += number % size * step
        number //= size
    return total


def _chain(pairs: list[tuple[str, str]]) -> tuple[int, ...]:
    """The devices that a permute goes through, from the first on."""
    following = {int(source): int(target) for source, target in pairs}
    if not following:
        return (0,)
    at, seen = min(following), []
    while at not in seen:
        seen.append(at)
        at = following.get(at, at)
    return tuple(seen)


def axes(group: Sequence[int], mesh_sizes: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes that a group spans, from the numbers of its devices."""
    strides = _strides(list(mesh_sizes.values()))
    coordinates = [
        [number // stride % size for stride, size in zip(strides, mesh_sizes.values())]
        for number in group
    ]
    return tuple(
        axis for axis, column in zip(mesh_sizes, zip(*coordinates)) if len(set(column)) > 1
    )
