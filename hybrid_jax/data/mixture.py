"""Which source the next row comes from: shares by weight, exact at every moment, and resumable."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_jax.config.data import Source


class Choice(NamedTuple):
    """A row of the global batch."""

    source: int
    row: int
    """How many rows of that source came before it."""


class Mixture:
    """Deals out rows to sources; all that it remembers is how much each has had and is owed.

    Each row owes every source its share, and goes to the one that is owed most. So the counts are
    never further from the weights than one row, also while weights change on the way.
    """

    def __init__(self, sources: Sequence[Source], num_rows: Sequence[int]):
        """`num_rows` of each source make an epoch of it."""
        self._sources = sources
        self._most = [
            None if source.max_epochs is None else int(source.max_epochs * rows)
            for source, rows in zip(sources, num_rows, strict=True)
        ]
        self._taken = [0] * len(sources)
        self._owed = [0.0] * len(sources)

    def choose(self, count: int, progress: float) -> list[Choice]:
        """The next `count` rows, when `progress` of the run, from 0 to 1, is done.

        Raises ValueError when every source has been seen as often as it may.
        """
        chosen = []
        for _ in range(count):
            weights = self._weights(progress)
            for idx, weight in enumerate(weights):
                self._owed[idx] += weight
            source = max(
                (idx for idx, weight in enumerate(weights) if weight), key=self._owed.__getitem__
            )
            self._owed[source] -= 1.0
            chosen.append(Choice(source, self._taken[source]))
            self._taken[source] += 1
        return chosen

    def _weights(self, progress: float) -> list[float]:
        """Shares of the next row; they sum to 1."""
        weights = [
            0.0 if most is not None and taken >= most else source.weight_at(progress)
            for source, most, taken in zip(self._sources, self._most, self._taken, strict=True)
        ]
        total = sum(weights)
        if not total:
            raise ValueError(
                f"No source has anything left to give at {progress:.1%} of the run: every one has "
                "weight 0 there or has been seen `max_epochs` times. Raise max_epochs or the "
                "weights, or lower --steps."
            )
        return [weight / total for weight in weights]

    @property
    def state(self) -> dict:
        """By source: rows taken, and rows owed; for `restore`, and valid JSON."""
        labels = [source.label for source in self._sources]
        return {
            "taken": dict(zip(labels, self._taken, strict=True)),
            "owed": dict(zip(labels, self._owed, strict=True)),
        }

    def restore(self, state: dict) -> None:
        """Continue from a `state`. Raises ValueError if it is of other sources."""
        labels = [source.label for source in self._sources]
        if set(state["taken"]) != set(labels):
            raise ValueError(
                f"The position is of the sources {sorted(state['taken'])}; here are "
                f"{sorted(labels)}."
            )
        self._taken = [int(state["taken"][label]) for label in labels]
        self._owed = [float(state["owed"][label]) for label in labels]
