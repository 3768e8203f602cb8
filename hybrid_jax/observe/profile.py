"""A trace of some steps by JAX's profiler, on request."""

import pathlib
from collections.abc import Callable

import jax


class Profile:
    """While active, traces the steps from `first` on into `directory`; `first` None: none."""

    def __init__(
        self, directory: pathlib.Path, first: int | None, steps: int, note: Callable[[str], None]
    ):
        """`note` is told where the trace is, or why there is none."""
        self._directory, self._first, self._note = directory, first, note
        self._last = None if first is None else first + steps - 1
        self._is_tracing = False

    def before(self, step: int) -> None:
        """Call before each step; the trace begins before the first of its steps."""
        if step == self._first:
            try:
                jax.profiler.start_trace(str(self._directory))
                self._is_tracing = True
            except (RuntimeError, OSError, ValueError) as error:
                self._note(f"Step {step} is not profiled: {error}")

    def after(self, step: int) -> None:
        """Call when a step has been computed."""
        if self._is_tracing and step == self._last:
            self._end()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._is_tracing:
            self._end()

    def _end(self) -> None:
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:
            self._note(f"The profile could not be written to {self._directory}: {error}")
            return
        self._note(
            f"A profile is in {self._directory}; look at it with TensorBoard (xprof) or Perfetto."
        )
