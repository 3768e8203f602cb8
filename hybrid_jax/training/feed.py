"""Rows of a global batch: which of them a process reads, and how they get to the devices."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from hybrid_jax.data import Batch
from hybrid_jax.model.parallel.placement import ROWS, Placement


class Feed:
    """Takes batches of this process's `rows` to its devices; without a placement, all as it is."""

    def __init__(self, placement: Placement | None, num_rows: int, length: int):
        """For global batches of `num_rows` rows of `length` tokens."""
        self.num_rows = num_rows
        self.rows: Sequence[int] = range(num_rows)
        """Numbers, in order, of the rows that devices of this process hold a part of."""
        self._shape = (num_rows, length)
        self._sharding = None
        if placement is not None:
            self._sharding = placement.sharding(*ROWS)
            parts = self._sharding.addressable_devices_indices_map(self._shape).values()
            indices = [index for index in parts if index is not None]
            self.rows = sorted({row for rows, _ in indices for row in range(num_rows)[rows]})
        self._place_of_row = {row: place for place, row in enumerate(self.rows)}

    def place(self, batch: Batch) -> Batch:
        """The global batch of which `batch` holds `rows`; arrays [num_rows, length]."""
        if self._sharding is None:
            return batch
        return jax.tree.map(functools.partial(self._place, self._sharding), batch)

    def _place(self, sharding: jax.sharding.Sharding, local: np.ndarray) -> jax.Array:
        def part(index):
            rows, times = index
            here = [self._place_of_row[row] for row in range(self.num_rows)[rows]]
            # Rows of one device follow one another, so this is a view.
            return local[here[0] : here[-1] + 1, times]

        return jax.make_array_from_callback(self._shape, sharding, part)
