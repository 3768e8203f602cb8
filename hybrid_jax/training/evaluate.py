"""The loss on held-out text."""

from collections.abc import Callable

import jax
import numpy as np

from hybrid_jax import data as data_lib
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import corpus
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training.feed import Feed
from hybrid_jax.training.parameters import Named


class Heldout:
    """Held-out rows of every source that has some; false if none has."""

    def __init__(
        self, config: TrainConfig, parts: tuple[corpus.Part, ...], placement: Placement | None
    ):
        length = config.data.sequence_length
        # In the store's order: evaluation does not depend on the seed.
        self._windows = {
            part.source.label: data_lib.WindowIndex(part.heldout, length, seed=None)
            for part in parts
            if part.heldout is not None
        }
        self._labels = [part.source.label for part in parts]
        self.feed = Feed(placement, config.rows_per_round, length)
        """Of batches of held-out rows."""

    def __bool__(self) -> bool:
        return bool(self._windows)

    def unigram_entropy(self) -> float:
        """Entropy in nats of all held-out targets' own distribution."""
        targets = [windows.all_targets() for windows in self._windows.values()]
        return data_lib.unigram_entropy(np.concatenate(targets))

    @property
    def first_batch(self) -> data_lib.Batch:
        """This process's rows of the first batch of the first source."""
        windows = next(iter(self._windows.values()))
        return next(data_lib.evaluation_batches(windows, self.feed.num_rows, 1, self.feed.rows))

    def losses(
        self,
        evaluation_step,
        params: Named,
        limit: int | None = None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> dict:
        """`heldout_loss`: mean nats a token over all rows, or `limit` batches of them.

        Of several sources also `heldout_loss_by_source`, in their order; None where nothing is held
        out.
        """
        if limit is not None:
            limit = max(1, limit // len(self._windows))
        sums = {
            label: _sums(evaluation_step, params, windows, self.feed, limit, after_batch)
            for label, windows in self._windows.items()
        }
        nll, weight = np.sum(list(sums.values()), axis=0)
        record: dict = {"heldout_loss": float(nll / weight)}
        if len(self._labels) > 1:
            record["heldout_loss_by_source"] = [
                sums[label][0] / sums[label][1] if label in sums else None for label in self._labels
            ]
        return record


def _sums(
    evaluation_step, params: Named, windows, feed: Feed, limit, after_batch
) -> tuple[float, float]:
    """(nats, weights) over the rows."""
    total, count = 0.0, 0.0
    for batch in data_lib.evaluation_batches(windows, feed.num_rows, limit, feed.rows):
        nll, weight = jax.device_get(evaluation_step(params, feed.place(batch)))
        after_batch()
        total, count = total + float(nll), count + float(weight)
    return total, count
