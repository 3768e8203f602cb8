"""Where the record of a step goes: the metrics file, event files, the progress line."""

import contextlib

from hybrid_jax import observe
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.observe import tensorboard
from hybrid_jax.training.run import RunDirectory
from sharding import processes


class Recorder:
    """While active, takes the records of one run; only the first process writes them."""

    def __init__(self, config: TrainConfig, run: RunDirectory, step: int, progress):
        """Continues after `step`: what stands in the files beyond it is dropped."""
        self._progress = progress
        self._files = contextlib.ExitStack()
        self._metrics: observe.MetricsFile | None = None
        self._events: tensorboard.EventFiles | None = None
        self._was_in_memory = False
        if processes.is_first():
            self._metrics = self._files.enter_context(
                observe.MetricsFile(run.metrics, keep_until_step=step)
            )
            if config.observation.tensorboard:
                self._events = self._files.enter_context(
                    tensorboard.EventFiles(run.tensorboard, step)
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._files.close()

    def append(self, record: dict, skipped: int) -> None:
        """The next step; `skipped` counts updates without effect in the whole run."""
        if self._metrics is not None:
            self._metrics.append(record)
            self._say_where(self._metrics)
        if self._events is not None:
            self._events.append(record)
        self._progress.update(
            record["step"],
            record["loss"],
            record["tokens_per_second"],
            mfu=record.get("mfu"),
            skipped=skipped,
        )

    def _say_where(self, metrics: observe.MetricsFile) -> None:
        if metrics.problem is not None and not self._was_in_memory:
            self._progress.note(
                f"The metrics cannot be written ({metrics.problem}). Training goes on; they are "
                "kept in memory and written when there is room."
            )
        elif metrics.problem is None and self._was_in_memory:
            self._progress.note("The metrics can be written again; none is missing.")
        self._was_in_memory = metrics.problem is not None
