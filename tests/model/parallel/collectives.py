"""What devices exchange in a compiled program."""

import re
from typing import NamedTuple

from hybrid_jax.plan import hlo
from hybrid_jax.plan.collectives import kind_of


class Collective(NamedTuple):
    """One operation, and the type of its result on a device: `("all-gather", "f32[4,8]")`."""

    kind: str
    result: str
    trips: int = 1
    """How often it runs, if it is in a loop that the program counts."""

    @property
    def num_bytes(self) -> int:
        """Of the result, once."""
        return hlo.shape_bytes(self.result)


def of(compiled) -> list[Collective]:
    """Every collective of a program; of several in one, each array."""
    program = hlo.read(compiled.as_text())
    loops = [x for body in program.computations.values() for x in body if x.opcode == "while"]
    trips = {loop.attribute(r"body=%?([\w.\-]+)"): program.trips(loop) for loop in loops}
    found = []
    for name, body in program.computations.items():
        for each in body:
            # Of an asynchronous pair the end: the type of its start holds the operands as well.
            kind = kind_of(each.opcode.removesuffix("-done"))
            if kind is not None and not each.opcode.endswith("-start"):
                types = re.findall(r"\w+\[[\d,]*\]", each.shape)
                found += [Collective(kind, one, trips.get(name) or 1) for one in types]
    return found
