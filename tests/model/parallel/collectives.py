"""What devices exchange in a compiled program."""

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"bf16": 2, "f32": 4, "s32": 4}


class Collective(NamedTuple):
    """One operation, and the type of its result on a device: `("all-gather", "f32[4,8]")`."""

    kind: str
    result: str

    @property
    def num_bytes(self) -> int:
        dtype, dims = self.result.rstrip("]").split("[")
        return _BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size)


def of(compiled) -> list[Collective]:
    """Every collective of a program, one in a loop once; of several in one, each array."""
    found = []
    for line in compiled.as_text().splitlines():
        # Of an asynchronous pair the end: the type of its start holds the operands as well.
        if match := re.search(rf" = (.*?) ({_KINDS})(-done)?\(", line):
            types = re.findall(r"\w+\[[\d,]*\]", match[1])
            found += [Collective(match[2], one) for one in types]
    return found
