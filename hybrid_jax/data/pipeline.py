"""Shuffled batches without end, deterministic, and continued exactly from a stored position."""

import collections.abc
from collections.abc import Callable, Sequence

import grain

from hybrid_jax.config.data import Source
from hybrid_jax.data import batch as batch_lib
from hybrid_jax.data.mixture import Mixture
from hybrid_jax.data.windows import WindowIndex


class Batches(collections.abc.Iterator):
    """An endless iterator of training batches with a position that can be stored.

    Every epoch of a source visits every row of it once in a new order. The global batch k is a
    function of (rows, sources, batch sizes, seed, k) alone; a process may take some of its rows, so
    the same position continues the same data on another number of processes or another mesh.

    No worker threads: a batch costs milliseconds, and the loop fetches the next one while the
    device is busy. Grain's threads hang on an exception (grain issue 1196).
    """

    def __init__(
        self,
        windows: Sequence[WindowIndex],
        sources: Sequence[Source],
        batch_size: Callable[[int], int],
        *,
        seed: int,
        steps: int,
        rows: Callable[[int], Sequence[int]] = range,
    ):
        """`batch_size(step)` counts the rows of a global batch; `steps` make a run.

        `rows(size)` are those to read of a batch of `size` rows.
        """
        self._mixture = Mixture(sources, [len(each) for each in windows])
        self._windows = [_endless(each, seed + idx) for idx, each in enumerate(windows)]
        self._batch_size = batch_size
        self._rows = rows
        self._steps = steps
        self._step = 0

    def __next__(self) -> batch_lib.Batch:
        size = self._batch_size(self._step)
        choices = self._mixture.choose(size, min(self._step / self._steps, 1.0))
        self._step += 1
        wanted = [choices[row] for row in self._rows(size)]
        return batch_lib.stack([self._windows[source][row] for source, row in wanted])

    @property
    def position(self) -> dict:
        """Where the data goes on; valid JSON."""
        return {"batches": self._step} | self._mixture.state

    def seek(self, position: dict) -> None:
        """Continue from a stored `position`."""
        self._mixture.restore(position)
        self._step = int(position["batches"])


def _endless(windows: WindowIndex, seed: int):
    """Epoch after epoch by random access, each in an order of its own."""
    # Without end for any purpose; Grain's own endless repeat overflows at one row a batch.
    epochs = (1 << 61) // len(windows)
    return grain.MapDataset.source(windows).seed(seed).shuffle().repeat(epochs)


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
