"""A source whose weights have low-rank corrections, read as if they were one weight each."""

import numpy as np

from hybrid_jax.checkpoint.formats import protocol
from hybrid_jax.model import lowrank


class Merged:
    """Wraps a source: the thin matrices disappear, and their weights are read with them added."""

    def __init__(self, source: protocol.Source, scale: float):
        """`scale` is how often a product counts."""
        self._source = source
        self._scale = scale
        ends = (lowrank.A, lowrank.B)
        self.tensors = {n: info for n, info in source.tensors.items() if not n.endswith(ends)}

    @property
    def bytes_read(self) -> int:
        """Of tensors, in this process so far."""
        return self._source.bytes_read

    def read(self, name: str) -> np.ndarray:
        """One weight, with what was learnt beside it."""
        weight = self._source.read(name)
        if name + lowrank.A not in self._source.tensors:
            return weight
        a, b = (self._source.read(name + end) for end in (lowrank.A, lowrank.B))
        return lowrank.merged(weight, a, b, self._scale)

    def read_many(self, names):
        """The named weights one after the other."""
        for name in names:
            yield name, self.read(name)

    def locate(self, name: str) -> str:
        """Path of the file that holds the weight."""
        return self._source.locate(name)

    def close(self) -> None:
        """Closes what it wraps."""
        self._source.close()
