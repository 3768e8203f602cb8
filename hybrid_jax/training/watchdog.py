"""Ends a process that hangs, saying where, so that its launcher starts it again."""

import faulthandler
import os
import pathlib
import threading
import time

import jax

from hybrid_jax.training.stop import START_AGAIN
from sharding import processes

# The descriptor itself: whatever stands in sys.stderr may be what hangs.
_STDERR = 2
# The file may lie on the very disk that hangs.
_SECONDS_TO_WRITE = 10.0
# The first process holds the others together: they go first, or they would fail instead.
_SECONDS_AFTER_THE_OTHERS = 10.0


class Watchdog:
    """While active, ends the process when nothing has been `alive` for too long."""

    def __init__(self, seconds: float | None, slow_seconds: float, directory: pathlib.Path):
        """`seconds` None watches nothing; `directory` gets hang-PROCESS.txt."""
        later = jax.process_count() > 1 and processes.is_first()
        self._grace = _SECONDS_AFTER_THE_OTHERS if later else 0.0
        self._seconds, self._slow_seconds = seconds, slow_seconds
        self._path = directory / f"hang-{jax.process_index()}.txt"
        self._deadline = float("inf")
        self._what = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()

    def alive(self, what: str = "a step") -> None:
        """Something was done; `what` comes next, and may take as long as a step."""
        self._expect(what, self._seconds)

    def slow(self, what: str) -> None:
        """Something was done; `what` comes next, and compiles or waits for a disk."""
        self._expect(what, self._slow_seconds)

    def _expect(self, what: str, seconds: float | None) -> None:
        if self._seconds is not None and seconds is not None:
            self._what = what
            self._deadline = time.monotonic() + max(seconds, self._seconds)

    def _watch(self) -> None:
        # Often enough to be in time, seldom enough to cost nothing.
        while not self._ended.wait(min(1.0, (self._seconds or 1.0) / 4)):
            if time.monotonic() > self._deadline + self._grace:
                self._end()

    def _end(self) -> None:
        words = (
            f"hang: {self._what} has not ended in time in process {jax.process_index()}. What each "
            f"thread was doing follows, and goes to {self._path}. This process ends with exit code "
            f"{START_AGAIN}; continue with --resume. If it was only slow, raise "
            "--faults.hang-seconds or --faults.slow-seconds."
        )
        os.write(_STDERR, f"{words}\n".encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        writer = threading.Thread(target=self._write, args=(words,), daemon=True)
        writer.start()
        writer.join(_SECONDS_TO_WRITE)
        os._exit(START_AGAIN)

    def _write(self, words: str) -> None:
        try:
            with self._path.open("w", encoding="utf-8") as file:
                print(words, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            os.write(_STDERR, f"{self._path} could not be written: {error}\n".encode())
