"""What a compiled program sends from device to device."""

import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all"
_COLLECTIVE = re.compile(rf" = (?P<shape>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(?:bf|f|s|u)(?P<bits>\d+)\[(?P<dims>[\d,]*)\]")
_LOOP = re.compile(
    r' while\(.* body=%?(?P<body>[\w.\-]+).*"known_trip_count":\{"n":"(?P<trips>\d+)"'
)
# A kernel's body is written over several lines, some of which begin at the margin.
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")


class Collective(NamedTuple):
    """One operation of a program, as often as it runs."""

    kind: str
    num_bytes: int
    """Of the result on one device. With asynchronous operations on TPU also of the operand."""
    trips: int


def collectives(compiled) -> list[Collective]:
    """All of them; those in a loop that the program itself counts know how often they run."""
    lines = compiled.as_text().splitlines()
    trips = {loop["body"]: int(loop["trips"]) for line in lines if (loop := _LOOP.search(line))}
    found, computation = [], ""
    for line in lines:
        if match := _COMPUTATION.match(line):
            computation = match["name"]
        elif match := _COLLECTIVE.search(line):
            found.append(
                Collective(match["kind"], _bytes(match["shape"]), trips.get(computation, 1))
            )
    return found


def _bytes(shapes: str) -> int:
    total = 0
    for array in _ARRAY.finditer(shapes):
        size = int(array["bits"]) // 8
        for dim in filter(None, array["dims"].split(",")):
            size *= int(dim)
        total += size
    return total
