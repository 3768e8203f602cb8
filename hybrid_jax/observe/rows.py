"""How many rows of work are done: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from rich import console as rich_console
from rich import progress as rich_progress

_SECONDS_BETWEEN_LINES = 10.0


class Rows:
    """Counts rows of work called `name`; used as a context manager around the work."""

    def __init__(self, name: str, total: int | None, stream=None):
        """`total` None: it is not known. `stream` defaults to standard error."""
        self._name, self._total, self._done = name, total, 0
        self._console = rich_console.Console(
            file=sys.stderr if stream is None else stream, highlight=False, soft_wrap=True
        )
        self._bar: rich_progress.Progress | None = None
        self._begin = self._last_line = time.monotonic()

    def __enter__(self):
        if self._console.is_terminal:
            columns = ("{task.description}", rich_progress.BarColumn(), "{task.completed} rows")
            self._bar = rich_progress.Progress(
                *columns, rich_progress.TimeRemainingColumn(), console=self._console, transient=True
            )
            self._bar.__enter__()
            self._bar.add_task(self._name, total=self._total)
        else:
            self._console.print(f"{self._name} ...", markup=False)
        return self

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.__exit__(*error)
            self._bar = None

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        self._done += rows
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], rows)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            of = "" if self._total is None else f" of {self._total:,}"
            seconds = now - self._begin
            self._console.print(
                f"{self._name}: {self._done:,}{of} rows in {seconds:.0f} s", markup=False
            )
            self._last_line = now
