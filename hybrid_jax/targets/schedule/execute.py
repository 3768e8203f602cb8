"""Run a kernel's scalar instructions to learn how often each bundle is issued and what is copied.

Loops over the grid, inner loops, `pl.when` and the window pipeline are all branches on scalars that
depend on nothing but the grid, so that running the scalar unit alone gives exact counts, whatever
the nest. A branch on data (a segment id read from memory, say) cannot be known; it is not taken,
which issues the region it would skip, and is counted as unresolved.
"""

import dataclasses
import itertools
import re

from hybrid_jax.targets.schedule import copies
from hybrid_jax.targets.schedule.bundles import Instruction, Program
from hybrid_jax.targets.schedule.machine import Machine

# Bundles after a branch, at most.
MOST_SLOTS = 6
# A bound against loops whose exit test was misread.
MOST_BLOCKS = 50_000_000


@dataclasses.dataclass
class Run:
    """What one core did."""

    counts: list[int]
    """How often each bundle was issued."""
    read_bytes: int = 0
    """Copied from HBM."""
    written_bytes: int = 0
    """Copied to HBM."""
    dmas: int = 0
    steps: int = 0
    """How often the body of the outermost loop ran, the window pipeline's last steps included."""
    unresolved: int = 0
    """Branches and copies that depend on data."""
    blocks: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """(first bundle, one past the last, how often) of code without a branch between."""


@dataclasses.dataclass
class _Block:
    """Bundles start..stop-1, entered at the first and left after the last."""

    start: int
    stop: int
    instructions: list[Instruction]
    branch: Instruction | None
    target: int | None


def run(program: Program, core: int | None) -> Run:
    """Run the program as one core: 0 or 1 of a megacore chip, None on others.

    Raises ValueError for what is not understood.
    """
    needed = _needed(program)
    blocks = _blocks(program, needed)
    machine = Machine(core)
    result = Run(counts=[])
    kinds = copies.classify(program)
    issued = dict.fromkeys(blocks, 0)
    loop = next((at for at, bundle in enumerate(program.bundles) if bundle.depth), None)
    at, length = 0, len(program.bundles)
    for _ in range(MOST_BLOCKS):
        if at >= length:
            break
        block = blocks[at]
        issued[at] += 1
        result.steps += at == loop
        for instruction in block.instructions:
            if instruction.opcode.startswith("dma."):
                _copy(machine, instruction, kinds[instruction.name], result)
            else:
                machine.perform(instruction)
        at = block.stop
        if block.branch is not None:
            taken = machine.holds(block.branch)
            result.unresolved += taken is None
            if taken:
                at = block.target
    else:
        raise ValueError("The kernel's loops do not end: a loop's exit test was misread.")
    result.counts = [0] * length
    for start, count in issued.items():
        result.blocks.append((start, blocks[start].stop, count))
        for address in range(start, blocks[start].stop):
            result.counts[address] += count
    return result


def _copy(machine: Machine, dma: Instruction, kind: copies.Copy, result: Run) -> None:
    """Count a DMA between HBM and the core."""
    started = machine.holds(dma)
    if started is False or not any(kind):
        return
    granules = machine.operand(copies.size(dma))
    result.unresolved += started is None or granules is None
    if granules is not None:
        result.dmas += 1
        result.read_bytes += kind.reads_hbm * granules * copies.GRANULE_BYTES
        result.written_bytes += kind.writes_hbm * granules * copies.GRANULE_BYTES


def _needed(program: Program) -> set[str]:
    """Values (and memory cells) that branches and copies depend on; nothing else is run."""
    every = [instruction for bundle in program.bundles for instruction in bundle.instructions]
    roots = [bundle.branch for bundle in program.bundles if bundle.branch]
    roots += [instruction for instruction in every if instruction.opcode.startswith("dma.")]
    makers: dict[str, list[Instruction]] = {}
    for instruction in every:
        stored = copies.cell(instruction) if instruction.opcode == "sst" else instruction.name
        makers.setdefault(stored, []).append(instruction)
    needed: set[str] = set()
    todo = [name for root in roots for name in _reads(root)]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += [read for maker in makers.get(name, ()) for read in _reads(maker)]
    return needed


def _reads(instruction: Instruction) -> set[str]:
    if instruction.opcode.startswith("dma."):
        # Where it copies from and to does not matter here.
        return {*re.findall(r"%(\w+)", copies.size(instruction)), instruction.predicate or ""}
    reads = instruction.reads()
    return reads | {copies.cell(instruction)} if instruction.opcode == "sld" else reads


def _blocks(program: Program, needed: set[str]) -> dict[int, _Block]:
    bundles = program.bundles
    branches = [address for address, bundle in enumerate(bundles) if bundle.branch]
    targets = {at: _target(program, bundles[at].branch) for at in branches}
    lasts = {_last_slot(program, at, targets): at for at in branches}
    if any(last >= after for last, after in zip(lasts, branches[1:], strict=False)):
        raise ValueError("A branch stands in the slots of another: not understood.")
    edges = {0, len(bundles)} | set(targets.values()) | {last + 1 for last in lasts}
    # The outermost loop starts a block, so that its passes are counted.
    edges |= {at for at, bundle in enumerate(bundles) if bundle.depth and not bundles[at - 1].depth}
    blocks = {}
    for start, stop in itertools.pairwise(sorted(edges)):
        instructions = [
            instruction
            for bundle in bundles[start:stop]
            for instruction in _phis_first(bundle.instructions)
            if _wanted(instruction, needed)
        ]
        at = lasts.get(stop - 1)
        branch = None if at is None else bundles[at].branch
        blocks[start] = _Block(start, stop, instructions, branch, targets.get(at))
    return blocks


def _last_slot(program: Program, at: int, targets: dict[int, int]) -> int:
    """The last bundle that is issued after a branch whether it is taken or not.

    Four bundles before tpu7x, up to six there. The compiler marks where they end, but not on an
    empty bundle of tpu7x; then it is what comes before the code that may not be issued.
    """
    target, bundles = targets[at], program.bundles
    others = [start for start in targets.values() if start > at]
    limit = min([*others, len(bundles), at + MOST_SLOTS + 1]) - 1
    if target <= at:
        outside = (
            after
            for after in range(at + 1, limit + 1)
            if bundles[after].depth is not None and bundles[after].depth < bundles[at].depth
        )
        return next(outside, limit + 1) - 1
    # The regions of an `if`: condition, branch, body, and the rest, to which the branch goes.
    marked = program.ends.get(str(int(_region(bundles[at].branch)) - 2))
    if marked is not None and at <= marked <= limit:
        return marked
    last = next((to for to in range(at + 1, limit + 1) if bundles[to].depth is None), at)
    while last < limit and bundles[last + 1].depth is None:
        last += 1
    return last


def _wanted(instruction: Instruction, needed: set[str]) -> bool:
    if instruction.opcode == "sst":
        return copies.cell(instruction) in needed
    return instruction.opcode.startswith("dma.") or instruction.name in needed


def _phis_first(instructions):
    return sorted(instructions, key=lambda instruction: instruction.opcode != "sphi")


def _target(program: Program, branch: Instruction) -> int:
    region = _region(branch)
    if region not in program.regions:
        raise ValueError(f"A branch goes nowhere known: {branch.operands!r}.")
    return program.regions[region]


def _region(branch: Instruction) -> str:
    found = re.search(r"target = \$region(\d+)", branch.operands)
    return found[1] if found else ""
