"""A TPU core's scalar unit, as far as loops and copies need it; what depends on data is unknown."""

import functools
import re
from collections.abc import Callable

from hybrid_jax.targets.schedule import copies
from hybrid_jax.targets.schedule.bundles import Instruction

# Where a core of a megacore chip finds its number.
_CORE_ID = "[smem:[#allocation0"


class Machine:
    """Scalar registers by the name of the value, with the time of each assignment."""

    def __init__(self, core: int | None):
        self._core = core
        self._values: dict[str, int | None] = {}
        self._assigned: dict[str, int] = {}
        self._memory: dict[str, int | None] = {}
        self._time = 0

    def perform(self, instruction: Instruction) -> None:
        """Run one instruction."""
        holds = self.holds(instruction)
        if instruction.opcode == "sst":
            if holds is not False:
                source = instruction.operands.rpartition("]")[2].strip(" ,")
                value = self.operand(source) if holds else None
                self._memory[copies.cell(instruction)] = value
            return
        if holds is False and instruction.otherwise is None:
            return
        if holds is None:
            value = None
        elif holds:
            value = self._result(instruction)
        else:
            value = self.operand(instruction.otherwise)
        self._time += 1
        self._values[instruction.name] = value
        self._assigned[instruction.name] = self._time

    def holds(self, instruction: Instruction) -> bool | None:
        """Whether its predicate holds; None if that depends on data."""
        if instruction.predicate is None:
            return True
        value = self._values.get(instruction.predicate)
        return None if value is None else bool(value) != instruction.negated

    def _result(self, instruction: Instruction) -> int | None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "sphi":
            # All inputs share one register; it holds whichever was written last.
            names = [name for name in _parse(operands) if isinstance(name, str)]
            latest = max(names, key=lambda name: self._assigned.get(name, -1))
            return self._values.get(latest)
        if opcode == "sld":
            return self._load(copies.cell(instruction))
        return _arithmetic(opcode, self._read(operands))

    def _load(self, cell: str) -> int | None:
        if cell == _CORE_ID and self._core is not None:
            return self._core
        # A cell addressed by a value may be anything: scalar prefetch, the kernel's own memory.
        return None if "%" in cell else self._memory.get(cell)

    def operand(self, text: str) -> int | None:
        """The value of a register or a number; None if unknown."""
        return self._read(text)[0]

    def _read(self, operands: str) -> list[int | None]:
        return [
            self._values.get(each) if isinstance(each, str) else each for each in _parse(operands)
        ]


@functools.lru_cache(maxsize=1 << 16)
def _parse(operands: str) -> tuple[str | int | None, ...]:
    """Names of values without their `%`, numbers, and None for what is neither."""
    parsed: list[str | int | None] = []
    for piece in re.sub(r"\[resolvable:\S*\]", "", operands).split(","):
        name = re.match(r"\s*%(\w+)", piece)
        try:
            parsed.append(name[1] if name else int(piece.strip(), 0))
        except ValueError:
            parsed.append(None)
    return tuple(parsed)


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


_COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sshll": lambda a, b: a << b if b < 32 else 0,
    "sshrl": lambda a, b: (a % 2**32) >> b,
    "sshra": lambda a, b: a >> b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": min,
    "smax": max,
}


def _arithmetic(opcode: str, values: list[int | None]) -> int | None:
    """None where an operand is unknown and matters, and for an opcode that is not known."""
    stem, _, suffix = opcode.partition(".")
    if stem in ("por", "pand", "pnor", "pnand", "pxor"):
        return _logic(stem, values)
    if stem == "scalar_select" and len(values) == 3:
        return None if values[0] is None else values[1 if values[0] else 2]
    if any(value is None for value in values):
        return None
    if stem == "smov":
        return values[0]
    if stem == "pneg":
        return int(not values[0])
    a, b = (*values, 0, 0)[:2]
    if "u32" in suffix:
        a, b = a % 2**32, b % 2**32
    else:
        a, b = _signed(a), _signed(b)
    if stem == "scmp" and suffix[:2] in _COMPARE:
        return int(_COMPARE[suffix[:2]](a, b))
    return _signed(_BINARY[stem](a, b)) if stem in _BINARY else None


def _logic(stem: str, values: list[int | None]) -> int | None:
    known = [bool(value) for value in values if value is not None]
    negate = stem in ("pnor", "pnand")
    if stem in ("por", "pnor"):
        value = True if any(known) else (None if None in values else False)
    elif stem in ("pand", "pnand"):
        value = False if not all(known) else (None if None in values else True)
    else:
        value = None if None in values else known[0] != known[1]
    return None if value is None else int(value != negate)
