"""Which of a kernel's copies (DMAs) read or write HBM, and how much they copy."""

import re
from typing import NamedTuple

from hybrid_jax.targets.schedule.bundles import Instruction, Program

# `size_in_granules` counts 32 bytes on every generation: a window of 1 MiB is 32768.
GRANULE_BYTES = 32

_SPACE = re.compile(r"\.(hbm|vmem|smem|cmem|sflag)$")
_DIRECTION = re.compile(r"dma\.([a-z]+)_to_([a-z]+)$")


class Copy(NamedTuple):
    """What a DMA between two memories means for HBM."""

    reads_hbm: bool
    writes_hbm: bool


def classify(program: Program) -> dict[str, Copy]:
    """Every copy of the program by the name of its instruction.

    Most name the two memories; `dma.general` has two addresses, whose making says where they point.
    ValueError if one cannot be told.
    """
    every = [instruction for bundle in program.bundles for instruction in bundle.instructions]
    makers: dict[str, list[Instruction]] = {}
    for instruction in every:
        stored = cell(instruction) if instruction.opcode == "sst" else instruction.name
        makers.setdefault(stored, []).append(instruction)
    copies = {}
    for dma in every:
        if not dma.opcode.startswith("dma."):
            continue
        if named := _DIRECTION.match(dma.opcode):
            source, destination = named[1], named[2]
        else:
            operands = arguments(dma)
            source, destination = (_space(operands[at], makers, set()) for at in (0, 2))
        if None in (source, destination):
            raise ValueError(f"A copy between memories that are not understood: {dma.operands!r}.")
        copies[dma.name] = Copy(source == "hbm", destination == "hbm")
    return copies


def _space(operand: str, makers: dict[str, list[Instruction]], seen: set[str]) -> str | None:
    """The memory an address points into; None if unknown."""
    for name in re.findall(r"%(\w+)", operand):
        for maker in makers.get(name, ()):
            if found := _made_in(maker, makers, seen | {name}):
                return found
    return "vmem" if operand.strip().startswith("[#") else None


def _made_in(maker: Instruction, makers, seen: set[str]) -> str | None:
    if space := _SPACE.search(maker.opcode):
        return space[1]
    if maker.opcode == "sld":
        stores = makers.get(cell(maker), ())
        sources = [store.operands.rpartition("]")[2] for store in stores]
    else:
        sources = [maker.operands, maker.otherwise or ""]
    for source in sources:
        if not set(re.findall(r"%(\w+)", source)) & seen and (
            found := _space(source, makers, seen)
        ):
            return found
    return None


def cell(instruction: Instruction) -> str:
    """The scalar memory cell of a load or store, by its text; a spill has a constant one."""
    return instruction.operands.partition("]")[0]


def arguments(dma: Instruction) -> list[str]:
    """Source, size, destination and more; what they are called was a comment."""
    return re.sub(r"\[thread:\S*\]\s*,?", "", dma.operands).split(",")


def size(dma: Instruction) -> str:
    """The operand that says how many granules are copied."""
    return arguments(dma)[1]
