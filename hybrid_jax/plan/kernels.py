"""How long a Pallas kernel takes on a TPU, from the instruction schedules of its like.

No kernel says what it takes: the compiler knows no estimate of it, and what it declares is what its
author believed. So `kernel_rates.json` holds the time of a unit of work of every kernel on every
generation, read from the schedule of one call (`python -m hybrid_jax.plan.rates`).
"""

import functools
import json
import math
import pathlib
import re

from hybrid_jax.plan import hlo

RATES = pathlib.Path(__file__).with_name("kernel_rates.json")
# Not read from a schedule of their own: `rates` says from what.
DERIVED = ("splash_mha_dq", "splash_mha_dkv")
# Tiles of scores that splash attention goes through, and skips whole above the diagonal.
_SCORE_TILE = 1024


@functools.cache
def rates() -> dict:
    """Seconds a unit of work: target -> kernel -> number."""
    return json.loads(RATES.read_text(encoding="utf-8"))["seconds_per_unit"]


def stem(name: str) -> str:
    """A kernel's name without the numbers the compiler adds."""
    return re.sub(r"([.]clone|[.]remat\d*|[.]\d+)+$", "", name)


def seconds(
    program: hlo.Program, computation: str, instruction: hlo.Instruction, chip: str, fill: float
) -> float | None:
    """Time of one call on one device; None for a kernel without a rate.

    `fill` is the share of the rows of an experts' buffer that are expected to be there: a kernel
    goes through these alone.
    """
    kernel = stem(instruction.name)
    if kernel == "unfilled":
        return 0.0
    rate = rates().get(chip, {}).get(family(kernel))
    if rate is None:
        return None
    known = program.defined[computation]
    shapes = [known[name].shape for name in instruction.operands if name in known]
    return rate * units(kernel, [hlo.dims(shape) for shape in shapes], _results(instruction), fill)


def family(kernel: str) -> str:
    """The name under which a kernel has a rate."""
    return re.sub(r"^(splash_m[hq]a_(?:fwd|dq|dkv)).*", r"\1", kernel)


def units(kernel: str, operands: list[list[int]], results: list[list[int]], fill: float) -> float:
    """What a kernel's work is counted in.

    Lightning attention: numbers in q. Splash attention: scores in tiles that are not skipped.
    Rows packed and unpacked: numbers. Grouped products: multiplications, of rows that are there.
    """
    if kernel in ("pack_rows", "unpack_rows"):
        return max(math.prod(dims) for dims in operands + results)
    if kernel.startswith("lightning_attention"):
        return max(math.prod(dims) for dims in operands)
    if kernel.startswith("splash"):
        # Queries; a ring's two blocks a step have a dim of their own before heads.
        rank = max(map(len, operands))
        *heads, length, _ = max((dims for dims in operands if len(dims) == rank), key=math.prod)
        tiles = max(1, length // _SCORE_TILE)
        scores = math.prod(heads) * length * length
        # A call that skips tiles is given a table of them, [1, tiles, tiles].
        skips = any(len(dims) == 3 and dims[0] == 1 and dims[1] == dims[2] for dims in operands)
        return scores * (1 + 1 / tiles) / 2 if skips else float(scores)
    # Rows `[R, K]` or `[P, R, K]`, matrices `[E, K, N]`, among operands or results.
    arrays = operands + results
    rows = next(dims[0] for dims in arrays if len(dims) == 2)
    _, depth, columns = next(dims for dims in arrays if len(dims) == 3 and dims[1] != rows)
    return rows * fill * depth * columns


def _results(instruction: hlo.Instruction) -> list[list[int]]:
    return hlo.all_dims(instruction.shape)
