"""Read a TPU kernel's final bundles: one line is what a core issues in one cycle."""

import re
from typing import NamedTuple

# One bundle: its address, a label (LB: a loop starts here), one `>` a loop around it, instructions.
_BUNDLE_START = re.compile(r"(?m)^(?=[ \t]*(?:0x[0-9a-f]+|0)[ \t]+(?:[A-Z]{2})?[ \t]*: )")
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_REGION_END = re.compile(r"End(?: empty)? region (\d+)")
_INSTRUCTION = re.compile(r"(?:%(?P<name>\w+) = )?(?P<opcode>[a-z][\w.]*)\s*(?P<rest>.*)", re.S)
_MATMUL, _UNIT = re.compile(r"= vmatmul\."), re.compile(r"mxu(\d)")
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, ([^)]*))?\)")

# What decides where a core goes and which DMAs it starts is scalar; vector arithmetic is not read.
_SCALAR = ("s", "p")


class Instruction(NamedTuple):
    """A scalar instruction, a branch, or a DMA."""

    name: str
    """The value it defines; without a `%`."""
    opcode: str
    predicate: str | None
    """It has an effect only if this value is true (false if `negated`)."""
    negated: bool
    otherwise: str | None
    """The operand that is the result where the predicate does not hold."""
    operands: str

    def reads(self) -> set[str]:
        """Names of all values it may read."""
        names = set(re.findall(r"%(\w+)", f"{self.operands} {self.otherwise or ''}"))
        return names | ({self.predicate} if self.predicate else set())


class Bundle(NamedTuple):
    """What is issued in one cycle, as far as it is read."""

    depth: int | None
    """Loops around it; None where nothing is issued."""
    instructions: tuple[Instruction, ...]
    branch: Instruction | None
    matmuls: tuple[int | None, ...]
    """The matrix unit of each product that is started; None where the text does not say."""


class Program(NamedTuple):
    """A kernel's bundles in the order of their addresses."""

    bundles: tuple[Bundle, ...]
    regions: dict[str, int]
    """Where a branch to a region goes."""
    ends: dict[str, int]
    """Last bundle of each region, where the compiler says."""
    grid: tuple[int, ...] | None
    """Steps along each grid dim on one core, as the window pipeline counts them."""


def read(text: str) -> Program:
    """Parse a file `*-final_bundles.txt`; ValueError if it does not look like one."""
    chunks = _BUNDLE_START.split(text)[1:]
    if not chunks:
        raise ValueError("No bundle found: this TPU compiler writes its schedules differently.")
    bundles = []
    regions: dict[str, int] = {}
    ends: dict[str, int] = {}
    for address, chunk in enumerate(chunks):
        code, comments = _split_comments(chunk)
        head, _, body = code.partition(":")
        found = int(head.split()[0], 0)
        if found != address:
            raise ValueError(f"Bundle {found:#x} follows bundle {address - 1:#x}; one is missing.")
        for region in _REGION_START.findall(comments):
            regions.setdefault(region, address)
        ends |= dict.fromkeys(_REGION_END.findall(comments), address)
        bundles.append(_bundle(body))
    bounds = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
    grid = tuple(int(bound) for bound in bounds[1].split(",") if bound.strip()) if bounds else None
    return Program(tuple(bundles), regions, ends, grid)


def _split_comments(text: str) -> tuple[str, str]:
    """(code, comments); comments nest."""
    code: list[str] = []
    comments: list[str] = []
    depth = last = 0
    for edge in _COMMENT_EDGE.finditer(text):
        (comments if depth else code).append(text[last : edge.start()])
        depth += 1 if edge[0] == "/*" else -1
        last = edge.end()
    code.append(text[last:])
    return " ".join(code), " ".join(comments)


def _bundle(body: str) -> Bundle:
    marks, _, rest = body.partition("{")
    content = rest.rpartition("}")[0].strip()
    instructions: list[Instruction] = []
    branch = None
    matmuls: list[int | None] = []
    for piece in content.split(";;"):
        if _MATMUL.search(piece):
            unit = _UNIT.search(piece)
            matmuls.append(int(unit[1]) if unit else None)
            continue
        instruction = _instruction(piece.strip())
        if instruction is None:
            continue
        if instruction.opcode.startswith("sbr"):
            branch = instruction
        else:
            instructions.append(instruction)
    return Bundle(
        marks.count(">") if content else None, tuple(instructions), branch, tuple(matmuls)
    )


def _instruction(text: str) -> Instruction | None:
    """None for what is not read: vector instructions, waits, checks."""
    match = _INSTRUCTION.match(text)
    if match is None:
        return None
    name, opcode, rest = match["name"] or "", match["opcode"], match["rest"]
    if opcode.startswith("dma.done") or not (
        name[:1] in _SCALAR or opcode.startswith(("sbr", "sst", "dma."))
    ):
        return None
    predicate = _PREDICATE.search(rest)
    if predicate is None:
        return Instruction(name, opcode, None, False, None, rest)
    rest = rest[: predicate.start()] + rest[predicate.end() :]
    otherwise = predicate[3]
    return Instruction(name, opcode, predicate[2], bool(predicate[1]), otherwise, rest.strip(" ,"))
