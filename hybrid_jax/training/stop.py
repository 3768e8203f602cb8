"""Ending a run on request: the first signal asks, the second insists."""

import signal
import threading

import jax

from sharding.agreement import Largest

# EX_TEMPFAIL of sysexits.h, for a process that its launcher should start again.
START_AGAIN = 75


class StopSignal:
    """While active, SIGINT and SIGTERM ask for an end instead of killing; a second one interrupts.

    With several processes a signal to any of them ends all after the same step. Outside the main
    thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self):
        self._number = 0
        self._former: dict = {}
        self._agreement = Largest() if jax.process_count() > 1 else None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def ask(self) -> None:
        """Once a step, before its update: tell the other processes whether a signal came."""
        if self._agreement is not None:
            self._agreement.hand_in(self._number)

    @property
    def name(self) -> str | None:
        """The signal that asks to end, or None; with several processes, as of the last `ask`."""
        number = self._number if self._agreement is None else self._agreement.result()
        return signal.Signals(number).name if number else None

    def _handle(self, number, frame):
        if self._number:
            raise KeyboardInterrupt
        self._number = number
