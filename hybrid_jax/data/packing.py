"""How documents share rows: which part of which document stands where.

A row has room for T pairs of neighbouring tokens (an input and its target); a document of n tokens
gives n - 1 pairs, and no pair joins two documents.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from hybrid_jax.config import data as config_lib


class Piece(NamedTuple):
    """A stretch of a document in a row, as one segment."""

    document: int
    begin: int
    """First token."""
    pairs: int
    padding: int = 0
    """Pairs of no meaning after it, in the same segment."""


class Packer(Protocol):
    """Rows by number."""

    num_rows: int

    def row(self, number: int) -> Iterator[Piece]:
        """Its pieces from left to right; what they leave is padding."""


class EndToEnd:
    """`Concatenate` and `Aligned`: every document takes the next places, over the ends of rows."""

    def __init__(self, pairs_in: np.ndarray, order: np.ndarray, length: int, multiple: int = 1):
        """Documents in `order`; each takes a multiple of `multiple` places."""
        self._order = order[pairs_in[order] > 0]
        self._pairs = pairs_in[self._order]
        takes = -(-self._pairs // multiple) * multiple
        self._first = np.concatenate([np.zeros(1, np.int64), np.cumsum(takes)])
        self._length = length
        self.num_rows = -(-int(self._first[-1]) // length)

    def row(self, number: int) -> Iterator[Piece]:
        begin = number * self._length
        end = min(begin + self._length, int(self._first[-1]))
        idx = int(np.searchsorted(self._first, begin, side="right")) - 1
        while begin < end:
            stop = min(int(self._first[idx + 1]), end)
            skipped = begin - int(self._first[idx])
            pairs = max(0, min(int(self._pairs[idx]) - skipped, stop - begin))
            yield Piece(int(self._order[idx]), skipped, pairs, stop - begin - pairs)
            begin, idx = stop, idx + 1


class FirstFitDecreasing:
    """`FirstFit`: the longest pieces first, each in the first row that has room."""

    def __init__(self, pairs_in: np.ndarray, order: np.ndarray, length: int):
        document, begin, pairs = _cut(pairs_in, order, length)
        # Stable: of equal length, those come first that come first in `order`.
        by_length = np.argsort(-pairs, kind="stable")
        document, begin, pairs = document[by_length], begin[by_length], pairs[by_length]
        row = _first_fit(pairs, length)
        # Pieces of a row together, in the order they came in.
        together = np.argsort(row, kind="stable")
        self._document, self._begin, self._pairs = (
            column[together] for column in (document, begin, pairs)
        )
        self.num_rows = int(row.max(initial=-1)) + 1
        self._first = np.searchsorted(row[together], np.arange(self.num_rows + 1))

    def row(self, number: int) -> Iterator[Piece]:
        for idx in range(self._first[number], self._first[number + 1]):
            yield Piece(int(self._document[idx]), int(self._begin[idx]), int(self._pairs[idx]))


def _cut(pairs_in: np.ndarray, order: np.ndarray, length: int):
    """(document, first token, pairs) of every piece: documents cut to at most `length` pairs."""
    order = order[pairs_in[order] > 0]
    pieces_in = -(-pairs_in[order] // length)
    document = np.repeat(order, pieces_in)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces_in)])[:-1]
    number = np.arange(len(document)) - np.repeat(first, pieces_in)
    begin = number * length
    return document, begin, np.minimum(pairs_in[document] - begin, length)


def _first_fit(pairs: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece; pieces descend in length. O(n log n) by a tree of the most room."""
    size = 1 << max(0, int(len(pairs) - 1).bit_length())
    # room[size + r] is what row r has left; each node above is the larger of the two below.
    room = [length] * (2 * size)
    rows = np.zeros(len(pairs), np.int64)
    for idx, need in enumerate(pairs.tolist()):
        node = 1
        while node < size:
            node *= 2
            if room[node] < need:
                node += 1
        rows[idx] = node - size
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def make(config: config_lib.Packing, lengths: np.ndarray, order: np.ndarray, length: int) -> Packer:
    """The packer that `config` means, for documents of `lengths` tokens taken in `order`."""
    pairs_in = lengths - 1
    if isinstance(config, config_lib.FirstFit):
        return FirstFitDecreasing(pairs_in, order, length)
    multiple = config.multiple if isinstance(config, config_lib.Aligned) else 1
    return EndToEnd(pairs_in, order, length, multiple)
