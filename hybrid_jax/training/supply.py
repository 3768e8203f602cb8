"""Training batches of a run on their devices, and where the data goes on after each."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_jax import data as data_lib
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import corpus
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training.feed import Feed


class Supplied(NamedTuple):
    """A batch of one update."""

    batch: data_lib.Batch
    """On the devices."""
    own: data_lib.Batch
    """This process's rows of it."""
    rows: Sequence[int]
    """Their numbers in the batch."""
    position: dict
    """Where the data goes on after it; valid JSON."""


class Supply:
    """Batches without end, of the sizes that the configuration says at each step."""

    def __init__(
        self,
        config: TrainConfig,
        windows: Sequence[data_lib.WindowIndex],
        placement: Placement | None,
    ):
        """`windows` are those of each source, as `windows_of` makes them."""
        length = config.data.sequence_length
        self._size_at = config.batch_size_at
        self._feeds = {size: Feed(placement, size, length) for size in config.batch_sizes}
        self._windows = windows
        self._batches = data_lib.Batches(
            windows,
            config.data.sources,
            config.batch_size_at,
            seed=config.seed,
            steps=config.steps,
            rows=lambda size: self._feeds[size].rows,
        )

    def next(self) -> Supplied:
        """The next batch, on its devices."""
        feed = self._feeds[self._size_at(self.position["batches"])]
        batch = next(self._batches)
        return Supplied(feed.place(batch), batch, feed.rows, self.position)

    def seek(self, position: dict) -> None:
        """Go on as after the batch that came with `position`."""
        self._batches.seek(position)

    @property
    def position(self) -> dict:
        """Where the data goes on; valid JSON."""
        return self._batches.position

    @property
    def efficiency(self) -> float:
        """Share of the places in rows that hold tokens; the rest is padding."""
        places = sum(len(each) for each in self._windows)
        return sum(each.efficiency * len(each) for each in self._windows) / places


def windows_of(config: TrainConfig, parts: tuple[corpus.Part, ...]) -> list[data_lib.WindowIndex]:
    """Rows of each source; numbered where there are several."""
    return [
        data_lib.WindowIndex(
            part.training,
            config.data.sequence_length,
            config.seed,
            config.data.packing,
            source=number if len(parts) > 1 else None,
        )
        for number, part in enumerate(parts)
    ]
