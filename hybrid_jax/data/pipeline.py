"""Shuffled batches without end, deterministic, and continued exactly from a stored position."""

import collections.abc
from collections.abc import Sequence

import grain

from hybrid_jax.data import batch as batch_lib
from hybrid_jax.data.windows import WindowIndex


class Batches(collections.abc.Iterator):
    """An endless iterator of training batches with a position that can be stored.

    Every epoch visits every window once in a new order. The global batch k is a function of
    (windows, batch_size, seed, k) alone; a process may take some of its rows, so the same position
    continues the same data on another number of processes or another mesh.

    No worker threads: a batch costs milliseconds, and the loop fetches the next one while the
    device is busy. Grain's threads hang on an exception (grain issue 1196).
    """

    def __init__(
        self,
        windows: WindowIndex,
        batch_size: int,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """`batch_size` counts rows of the global batch; `rows` are those to read, None all."""
        # Without end for any purpose; Grain's own endless repeat overflows at one row a batch.
        epochs = (1 << 61) // len(windows)
        self._windows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat(epochs)
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self.position = 0
        """Batches taken since the beginning of training."""

    def __next__(self) -> batch_lib.Batch:
        first = self.position * self._batch_size
        self.position += 1
        return batch_lib.stack([self._windows[first + row] for row in self._rows])

    def seek(self, position: int) -> None:
        """Continue as if `position` batches had been taken."""
        self.position = position


def evaluation_batches(
    windows: WindowIndex,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
):
    """All windows in order (at most `limit` batches), always the same; the last batch is padded.

    With a limit the windows are spread evenly over the held-out text. `rows` are those of each
    batch to read, None all.
    """
    rows = range(batch_size) if rows is None else rows
    numbers = list(range(len(windows)))
    if limit is not None and len(numbers) > limit * batch_size:
        wanted = limit * batch_size
        numbers = [idx * len(numbers) // wanted for idx in range(wanted)]
    empty = batch_lib.empty_like(windows[0])
    for begin in range(0, len(numbers), batch_size):
        batch = numbers[begin : begin + batch_size]
        yield batch_lib.stack([windows[batch[r]] if r < len(batch) else empty for r in rows])
