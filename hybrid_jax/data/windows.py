"""Windows of equal length over packed documents, each one computed from its number alone."""

import numpy as np

from hybrid_jax.data.batch import Batch
from hybrid_jax.data.store import TokenStore


class WindowIndex:
    """Window i of `sequence_length` (input, target) pairs, by random access.

    Documents are laid end to end in an order drawn from `seed`, and every window takes the next
    `sequence_length` pairs of neighbouring tokens. A pair never joins two documents: a document of
    n tokens gives n - 1 pairs. A document cut by the end of a window goes on in the next as a
    segment of its own. Only the last window has padding. Nothing here depends on the number of
    hosts or on what was read before, so any window can be made anywhere, again and again.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int | None = 0):
        """`seed=None` keeps the documents in the store's order.

        Raises ValueError if there is not a single pair.
        """
        num_pairs_in = np.diff(store.offsets) - 1
        order = np.arange(store.num_documents)
        if seed is not None:
            order = np.random.default_rng([seed, 0x0D0C]).permutation(order)
        order = order[num_pairs_in[order] > 0]
        self._store = store
        self._length = sequence_length
        self._first_token = store.offsets[:-1][order]
        self._first_pair = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_pairs_in[order])])
        self.num_pairs = int(self._first_pair[-1])
        if not self.num_pairs:
            raise ValueError(
                "The data holds no document of two tokens or more, so there is nothing to predict."
            )

    def __len__(self) -> int:
        return -(-self.num_pairs // self._length)

    def __iter__(self):
        return (self[idx] for idx in range(len(self)))

    def __getitem__(self, idx) -> Batch:
        """Window `idx` as a Batch of rows [T]."""
        begin = int(idx) * self._length
        if not 0 <= begin < self.num_pairs:
            raise IndexError(f"There are {len(self)} windows; got index {idx}.")
        end = min(begin + self._length, self.num_pairs)
        pair_T = np.arange(begin, end)
        document_T = np.searchsorted(self._first_pair, pair_T, side="right") - 1
        token_T = self._first_token[document_T] + (pair_T - self._first_pair[document_T])
        segment_T = document_T - document_T[0] + 1
        segment_begin_T = np.maximum(self._first_pair[document_T], begin)
        columns = (
            self._store.ids[token_T].astype(np.int32),
            self._store.ids[token_T + 1].astype(np.int32),
            segment_T.astype(np.int32),
            (pair_T - segment_begin_T).astype(np.int32),
            np.ones(end - begin, np.float32),
        )
        padding = self._length - (end - begin)
        return Batch(*(np.pad(column, (0, padding)) for column in columns))

    def all_targets(self) -> np.ndarray:
        """Every target that carries weight, window by window; int32."""
        return np.concatenate([row.targets_BT[row.weights_BT > 0] for row in self])
