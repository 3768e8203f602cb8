"""The loss on held-out text."""

from collections.abc import Callable

import jax

from hybrid_jax.data import WindowIndex, evaluation_batches
from hybrid_jax.training.feed import Feed
from hybrid_jax.training.parameters import Named


def heldout_loss(
    evaluation_step,
    params: Named,
    windows: WindowIndex,
    feed: Feed,
    limit: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean nats a token over `windows`: all of them, or `limit` batches spread over the text."""
    total, count = 0.0, 0.0
    for batch in evaluation_batches(windows, feed.num_rows, limit, feed.rows):
        nll, weight = jax.device_get(evaluation_step(params, feed.place(batch)))
        after_batch()
        total, count = total + float(nll), count + float(weight)
    return total / count
