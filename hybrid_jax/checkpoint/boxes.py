"""Boxes of values in an array: from where to where in every dim."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Box:
    """The values from `begin` up to `end`, one number a dim; unlike slices, a key of dicts."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Everything in an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def at(cls, begin: Sequence[int], shape: Sequence[int]) -> "Box":
        """So many values in every dim from `begin` on."""
        end = (first + size for first, size in zip(begin, shape, strict=True))
        return cls(tuple(begin), tuple(end))

    @classmethod
    def of(cls, index: Sequence[slice], shape: Sequence[int]) -> "Box":
        """What slices without a step take, as `jax.sharding` hands them to whoever fills arrays."""
        bounds = [item.indices(size) for item, size in zip(index, shape, strict=True)]
        return cls(tuple(begin for begin, _, _ in bounds), tuple(end for _, end, _ in bounds))

    @property
    def shape(self) -> tuple[int, ...]:
        """Values in every dim."""
        return tuple(end - begin for begin, end in zip(self.begin, self.end, strict=True))

    @property
    def size(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """As numpy understands it."""
        return tuple(map(slice, self.begin, self.end))

    def meet(self, other: "Box") -> "Box | None":
        """What lies in both; None if nothing does."""
        begin = tuple(map(max, self.begin, other.begin))
        end = tuple(map(min, self.end, other.end))
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, end)

    def within(self, outer: "Box") -> "Box":
        """The same values, counted from where `outer` begins."""
        moved = (
            tuple(a - b for a, b in zip(side, outer.begin, strict=True))
            for side in (self.begin, self.end)
        )
        return Box(*moved)

    def pieces(self, most: int) -> Iterator["Box"]:
        """Cut along the first dims, in C order, into pieces of at most `most` values each."""
        if self.size <= most or not self.begin:
            yield self
            return
        dim, inner = 0, self.size // self.shape[0]
        while inner > most:
            dim += 1
            inner //= self.shape[dim]
        step = most // inner
        outer = [range(b, e) for b, e in zip(self.begin[:dim], self.end[:dim], strict=True)]
        for place in itertools.product(*outer):
            for first in range(self.begin[dim], self.end[dim], step):
                begin = (*place, first, *self.begin[dim + 1 :])
                last = min(first + step, self.end[dim])
                yield Box(begin, (*(i + 1 for i in place), last, *self.end[dim + 1 :]))


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of them."""
    boxes = list(boxes)
    begin = tuple(map(min, zip(*(box.begin for box in boxes), strict=True)))
    return Box(begin, tuple(map(max, zip(*(box.end for box in boxes), strict=True))))
