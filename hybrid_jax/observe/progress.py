"""A live line on a terminal, plain lines elsewhere: step, loss, tokens a second, time left."""

import sys
import time

from rich import console as rich_console
from rich import live, text

_SECONDS_BETWEEN_LINES = 10.0
# Weight of the newest step in the mean that the time left is computed from.
_NEWEST = 0.1


class Progress:
    """Shows how a run goes; used as a context manager around the loop."""

    def __init__(self, stream=None):
        """`stream` defaults to standard output; a terminal gets one line that is rewritten."""
        stream = sys.stdout if stream is None else stream
        self._console = rich_console.Console(file=stream, highlight=False, soft_wrap=True)
        self._total = 1
        self._step = 0
        self._first_step = 0
        self._seconds_per_step: float | None = None
        self._last_time: float | None = None
        self._last_line = float("-inf")
        self._live: live.Live | None = None

    def __enter__(self):
        if self._console.is_terminal:
            self._live = live.Live(text.Text(), console=self._console, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, *error):
        if self._live is not None:
            self._live.__exit__(*error)
            self._live = None

    def start(self, step: int, total_steps: int) -> None:
        """Say where a run begins or goes on; compiling still counts to its first step."""
        self._step = self._first_step = step
        self._total = total_steps

    def note(self, message: str) -> None:
        """Print a line that stays."""
        self._console.print(message, markup=False)

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        *,
        mfu: float | None = None,
        skipped: int = 0,
    ) -> None:
        """Call once after every step; `skipped` counts updates without effect in the whole run."""
        now = time.monotonic()
        if self._last_time is not None and step > self._step:
            seconds = (now - self._last_time) / (step - self._step)
            old = self._seconds_per_step
            self._seconds_per_step = seconds if old is None else old + _NEWEST * (seconds - old)
        self._last_time, self._step = now, step
        line = self.line(step, loss, tokens_per_second, mfu, skipped)
        if self._live is not None:
            self._live.update(text.Text(line), refresh=True)
        elif step in (self._first_step + 1, self._total) or self._is_due(now):
            self._console.print(line, markup=False)
            self._last_line = now

    def line(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        mfu: float | None = None,
        skipped: int = 0,
    ) -> str:
        """The text of the progress line."""
        share = step / self._total
        filled = round(20 * share)
        bar = "━" * filled + "╌" * (20 - filled)
        return (
            f"{bar} step {step}/{self._total} ({share:.0%})  loss {loss:.3f}  "
            f"{tokens_per_second:,.0f} tokens/s"
            f"{'' if mfu is None else f' ({mfu:.0%} MFU)'}"
            f"{f'  {skipped} skipped' if skipped else ''}  {self._time_left(step)}"
        )

    def _is_due(self, now: float) -> bool:
        return now - self._last_line >= _SECONDS_BETWEEN_LINES

    def _time_left(self, step: int) -> str:
        if step >= self._total:
            return "done"
        if self._seconds_per_step is None:
            return "time left: measuring"
        minutes, seconds = divmod(round(self._seconds_per_step * (self._total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{minutes}:{seconds:02d}"
        return f"{hours}:{clock.zfill(5)} left" if hours else f"{clock} left"
