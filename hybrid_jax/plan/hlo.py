"""Read a compiled program's text: computations, instructions, shapes, loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
    "c64": 8, "c128": 16, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    """The type of its result as it is written; a tuple in parentheses."""
    opcode: str
    operands: tuple[str, ...]
    """Names of the instructions it reads."""
    attributes: str
    """What follows the operands."""

    @functools.cached_property
    def bytes(self) -> int:
        """Size of the result; of a tuple, of all its parts."""
        return shape_bytes(self.shape)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations it calls: a fusion's, a loop's, a branch's."""
        return tuple(
            name
            for group in _CALLED.findall(self.attributes)
            for name in re.findall(r"[\w.\-]+", group)
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A module whose instructions stand in the order of its schedule."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def defined(self) -> dict[str, dict[str, Instruction]]:
        """Instructions of each computation by name."""
        return {
            name: {each.name: each for each in body} for name, body in self.computations.items()
        }

    def operand_bytes(self, computation: str, instruction: Instruction) -> list[int]:
        """Sizes of what an instruction reads."""
        known = self.defined[computation]
        return [known[name].bytes for name in instruction.operands if name in known]

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None if its text does not say."""
        if stated := loop.attribute(r"known_trip_count[^0-9]*(\d+)"):
            return int(stated)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        return _compared_with(self.computations, condition) if condition else None

    def pieces(self, loop: Instruction) -> int:
        """How often a `while` could slice the longest array that it goes through piece by piece."""
        body = loop.attribute(r"body=%?([\w.\-]+)")
        return max(self._pieces(body or ""), default=1)

    def _pieces(self, computation: str) -> Iterator[int]:
        known = self.defined.get(computation, {})
        for instruction in known.values():
            if instruction.opcode == "dynamic-slice" and instruction.operands[0] in known:
                whole, part = (dims(x.shape) for x in (known[instruction.operands[0]], instruction))
                # A dim of which one is taken is picked from, as a layer from all layers.
                yield from (n // size for n, size in zip(whole, part) if size > 1)
            # What an inner loop slices is that loop's to count.
            for called in instruction.called if instruction.opcode != "while" else ():
                yield from self._pieces(called)

    def inside(self, computation: str):
        """All instructions of a computation and of those it calls."""
        for instruction in self.computations[computation]:
            yield instruction
            for called in instruction.called:
                if called in self.computations:
                    yield from self.inside(called)


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a type, padding left out."""
    return sum(
        math.ceil(_BYTES.get(kind, 0) * math.prod(_dims(dims)))
        for kind, dims in _ARRAY.findall(shape)
    )


def dims(shape: str) -> list[int]:
    """Sizes of an array type, or of the first array in a tuple."""
    return next(iter(all_dims(shape)), [])


def all_dims(shape: str) -> list[list[int]]:
    """Sizes of every array in a type."""
    return [_dims(sizes) for _, sizes in _ARRAY.findall(shape)]


def _dims(text: str) -> list[int]:
    return [int(dim.removeprefix("<=")) for dim in text.split(",") if dim]


def read(text: str) -> Program:
    """Parse `compiled.as_text()`; ValueError if it holds no entry computation."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = None, None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            if head := _HEAD.match(line):
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            parsed = (_instruction(each) for each in lines)
            computations[name] = tuple(each for each in parsed if each is not None)
            name = None
        elif _NAME.match(line):
            lines.append(line)
        elif lines:
            # Some attributes are written over several lines.
            lines[-1] += " " + line.strip()
    if entry is None:
        raise ValueError("The compiler's text holds no ENTRY computation.")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    shape, rest = _first_type(line[head.end() :])
    opcode, paren, rest = rest.lstrip().partition("(")
    if not paren:
        return None
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    if not operands and opcode not in ("parameter", "constant"):
        operands = tuple(re.findall(r"(?:^|[ ,])([a-zA-Z_][\w.\-]*)(?=,|$)", rest[:end]))
    # A constant's value and a parameter's number stand where operands do.
    attributes = rest[end + 1 :]
    if opcode in ("constant", "parameter"):
        attributes = f"value={rest[:end]}{attributes}"
    return Instruction(head[2], shape, opcode, operands, attributes)


def _first_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple with comments, and what follows it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:]


def _closing(text: str) -> int:
    """Where the parenthesis that was opened before `text` is closed."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _compared_with(computations, condition: str) -> int | None:
    """The bound of a counting loop: the only whole number its condition compares with."""
    found = {
        int(value)
        for instruction in computations.get(condition, ())
        for name in (condition, *instruction.called)
        for each in computations.get(name, ())
        if each.opcode == "constant"
        and (value := each.attribute(r"value=(-?\d+)"))
        and each.shape.startswith(("s32[]", "u32[]", "s64[]"))
    }
    return found.pop() if len(found) == 1 else None
