"""Shuffled batches without end, deterministic, and continued exactly from a stored position."""

import collections.abc

import grain
import numpy as np

from hybrid_jax.data import batch as batch_lib
from hybrid_jax.data.windows import WindowIndex


class Batches(collections.abc.Iterator):
    """An endless iterator of training batches with a position that can be stored.

    Every epoch visits every window once in a new order. The global batch k is a function of
    (windows, batch_size, seed, k) alone; host h of n takes its rows h, h + n, ..., so the same
    position continues the same data on another number of hosts.

    No worker threads: a batch costs milliseconds, and the loop fetches the next one while the
    device is busy. Grain's threads hang on an exception (grain issue 1196).
    """

    def __init__(
        self,
        windows: WindowIndex,
        batch_size: int,
        *,
        seed: int,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """`batch_size` counts rows over all hosts. Raises ValueError if hosts do not divide it."""
        if batch_size % num_hosts:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the number of hosts, {num_hosts}."
            )
        # Without end for any purpose; Grain's own endless repeat overflows at one row a batch.
        epochs = (1 << 61) // len(windows)
        dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat(epochs)
        dataset = dataset[host::num_hosts].batch(batch_size // num_hosts, batch_fn=batch_lib.stack)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> batch_lib.Batch:
        return next(self._iterator)

    @property
    def position(self) -> int:
        """Batches taken since the beginning of training."""
        return int(self._iterator.get_state()["next_index"])

    def seek(self, position: int) -> None:
        """Continue as if `position` batches had been taken."""
        self._iterator.set_state({"next_index": position})


def evaluation_batches(windows: WindowIndex, batch_size: int, limit: int | None = None):
    """All windows in order (at most `limit` batches), always the same; the last batch is padded.

    With a limit the windows are spread evenly over the held-out text.
    """
    numbers = list(range(len(windows)))
    if limit is not None and len(numbers) > limit * batch_size:
        wanted = limit * batch_size
        numbers = [idx * len(numbers) // wanted for idx in range(wanted)]
    for begin in range(0, len(numbers), batch_size):
        rows = [windows[idx] for idx in numbers[begin : begin + batch_size]]
        empty = batch_lib.Batch(*(np.zeros_like(column) for column in rows[0]))
        yield batch_lib.stack(rows + [empty] * (batch_size - len(rows)))
