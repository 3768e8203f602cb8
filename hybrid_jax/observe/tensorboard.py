"""The metrics as TensorBoard event files, for those who have it."""

import importlib.util
import math
import pathlib


def require() -> None:
    """Raises ModuleNotFoundError, with the way out, if the extra is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ModuleNotFoundError(
            "observation.tensorboard needs tensorboardX, which is not installed: pip install "
            "'hybrid-jax[tensorboard]', or leave it out; metrics.jsonl has the same numbers."
        )


class EventFiles:
    """Writes records from `after_step` on; TensorBoard drops what was there beyond."""

    def __init__(self, directory: pathlib.Path, after_step: int):
        """Continues after a former start's `after_step`. Raises OSError."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            logdir=str(directory), purge_step=after_step + 1 if after_step else None
        )

    def append(self, record: dict) -> None:
        """One step; a list becomes one curve an element. What is no number is left out."""
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, list):
                for idx, each in enumerate(value):
                    self._add(f"{name}/{idx}", each, step)
            elif name != "step":
                self._add(name, value, step)

    def _add(self, name: str, value, step: int) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self._writer.add_scalar(name, value, step)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.close()
