"""One side of a benchmark in a process of its own, so that memory and thread pools do not mix."""

import contextlib
import multiprocessing
import os
import pathlib
import traceback

THREADS = 2


class Worker:
    """Runs methods of an object that lives in a child process; one call at a time."""

    def __init__(self, build, *args):
        """`build(*args)` makes the object in the child; it must be importable."""
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, build, args), daemon=True)
        self._process.start()
        child.close()
        self._receive()

    def call(self, method: str, *args):
        """(result of object.method(*args), peak resident bytes of the child during the call)."""
        self._connection.send((method, args))
        return self._receive()

    def close(self) -> None:
        """End the child."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(timeout=10)
        self._process.kill()

    def _receive(self):
        try:
            failed, value = self._connection.recv()
        except EOFError as error:
            raise OSError(
                f"The benchmark process ended with code {self._process.exitcode}; out of memory?"
            ) from error
        if failed:
            raise failed from OSError(value)
        return value


def _serve(connection, build, args) -> None:
    _pin_threads()
    try:
        target = build(*args)
        connection.send((None, None))
        while (message := connection.recv()) is not None:
            method, arguments = message
            _reset_peak()
            result = getattr(target, method)(*arguments)
            connection.send((None, (result, _peak_bytes())))
    except Exception as error:  # handed to the parent, which raises it
        connection.send((error, traceback.format_exc()))


def _pin_threads() -> None:
    """Both sides get the same processors; XLA sizes its pools by what it may run on."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[:THREADS]
        os.sched_setaffinity(0, allowed)


def _reset_peak() -> None:
    # Linux: 5 resets the peak of the resident set; elsewhere the peak is that of the whole life.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
