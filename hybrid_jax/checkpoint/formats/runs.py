"""Which bytes of a tensor a part of it needs: few long reads rather than many short ones."""

import itertools
import math
import typing
from collections.abc import Iterator

from hybrid_jax.checkpoint.boxes import Box


class Read(typing.NamedTuple):
    """Bytes to read in one piece, and the values among them that are wanted."""

    offset: int
    """From the tensor's first byte."""
    nbytes: int
    where: tuple
    """Index into the part."""
    shape: tuple[int, ...]
    """Of the values wanted."""
    strides: tuple[int, ...]
    """Bytes between them."""
    is_dense: bool
    """Whether they are all that is read."""


def reads(
    shape: tuple[int, ...], part: Box, itemsize: int, gap_bytes: int, most_bytes: int
) -> Iterator[Read]:
    """What to read for a part of a tensor that lies in C order, each of its values once.

    Args:
        shape: The tensor's.
        part: What is wanted of it.
        itemsize: Bytes a value.
        gap_bytes: Bytes between two runs that are read along rather than begin another read.
        most_bytes: A read is cut up to be no longer, if it can be cut.
    """
    if not part.size:
        return
    begin, wanted = part.begin or (0,), part.shape or (1,)
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(wanted))]
    span = _spans(wanted, strides, itemsize)
    level = _level(shape or (1,), wanted, strides, span, gap_bytes)
    while level < len(wanted) - 1 and span[level + 1] > most_bytes:
        level += 1
    step = max(1, (most_bytes - span[level + 1]) // strides[level] + 1)
    start = sum(b * stride for b, stride in zip(begin, strides, strict=True))
    inner = math.prod(wanted[level + 1 :]) * itemsize
    for outer in itertools.product(*map(range, wanted[:level])):
        base = start + sum(i * stride for i, stride in zip(outer, strides, strict=False))
        for first in range(0, wanted[level], step):
            count = min(step, wanted[level] - first)
            nbytes = (count - 1) * strides[level] + span[level + 1]
            yield Read(
                base + first * strides[level],
                nbytes,
                (*outer, slice(first, first + count)),
                (count, *wanted[level + 1 :]),
                tuple(strides[level:]),
                nbytes == count * inner,
            )


def _spans(wanted, strides, itemsize: int) -> list[int]:
    """Bytes from the first to the last wanted value, of the dims from each on; last, of none."""
    spans = [itemsize]
    for size, stride in zip(reversed(wanted), reversed(strides), strict=True):
        spans.append(spans[-1] + (size - 1) * stride)
    return spans[::-1]


def _level(shape, wanted, strides, span, gap_bytes: int) -> int:
    """The dim from which on one read takes everything."""
    level = len(wanted) - 1
    while level and wanted[level] == shape[level]:
        level -= 1
    while level and (wanted[level - 1] == 1 or strides[level - 1] - span[level] <= gap_bytes):
        level -= 1
    return level
