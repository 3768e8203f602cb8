"""Ending a run on request: the first signal asks, the second insists."""

import signal
import threading


class StopSignal:
    """While active, SIGINT and SIGTERM set `name` instead of killing; a second one interrupts.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self):
        self.name: str | None = None
        self._former: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
