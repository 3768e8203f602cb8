"""Rows of equal length over packed documents, each one computed from its number alone."""

import numpy as np

from hybrid_jax.config.data import Concatenate, Packing
from hybrid_jax.data import packing as packing_lib
from hybrid_jax.data.batch import Batch
from hybrid_jax.data.store import TokenStore

END_TO_END = Concatenate()


class WindowIndex:
    """Row i of `sequence_length` (input, target) pairs, by random access.

    Documents are taken in an order drawn from `seed`. A pair never joins two documents: a document
    of n tokens gives n - 1 pairs. A document cut by the end of a row goes on in another as a
    segment of its own. Nothing here depends on the number of hosts or on what was read before, so
    any row can be made anywhere, again and again.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        seed: int | None = 0,
        packing: Packing = END_TO_END,
        source: int | None = None,
    ):
        """`seed=None` keeps the documents in the store's order.

        `source` is the number that rows carry as `sources_BT`; None: they carry none. Raises
        ValueError if there is not a single pair.
        """
        order = np.arange(store.num_documents)
        if seed is not None:
            order = np.random.default_rng([seed, 0x0D0C]).permutation(order)
        self.num_pairs = int(np.maximum(store.lengths - 1, 0).sum())
        if not self.num_pairs:
            raise ValueError(
                "The data holds no document of two tokens or more, so there is nothing to predict."
            )
        self._store = store
        self._length = sequence_length
        self._source = source
        self._packer = packing_lib.make(packing, store.lengths, order, sequence_length)

    def __len__(self) -> int:
        return self._packer.num_rows

    def __iter__(self):
        return (self[idx] for idx in range(len(self)))

    @property
    def efficiency(self) -> float:
        """Share of the places in all rows that hold a pair; the rest is padding."""
        return self.num_pairs / (len(self) * self._length)

    def __getitem__(self, idx) -> Batch:
        """Row `idx` as a Batch of arrays [T]."""
        if not 0 <= int(idx) < len(self):
            raise IndexError(f"There are {len(self)} rows; got index {idx}.")
        tokens, targets, segments, positions = np.zeros((4, self._length), np.int32)
        weights = np.zeros(self._length, np.float32)
        place = 0
        for number, piece in enumerate(self._packer.row(int(idx)), start=1):
            ids, learned = self._store.read(
                piece.document, piece.begin, piece.begin + piece.pairs + 1
            )
            here = slice(place, place + piece.pairs)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            weights[here] = 1.0 if learned is None else learned[1:]
            # Padding behind a document is its own, or a row would hold padding in its midst.
            whole = slice(place, place + piece.pairs + piece.padding)
            segments[whole] = number
            positions[whole] = np.arange(piece.pairs + piece.padding)
            place = whole.stop
        sources = None
        if self._source is not None:
            sources = np.full(self._length, self._source, np.int32)
        return Batch(tokens, targets, segments, positions, weights, sources)

    def all_targets(self) -> np.ndarray:
        """Every target that carries weight, row by row; int32."""
        return np.concatenate([row.targets_BT[row.weights_BT > 0] for row in self])
