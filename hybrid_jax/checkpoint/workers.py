"""Local processes that share the units of a conversion; each holds a few tensors.

Processes and no threads: Orbax mixes up what two threads save. They are told what to do on their
standard input, whose end means that nobody needs them any more, and say what they did on their
standard output.
"""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from hybrid_jax.checkpoint.conversion import Conversion, Job
from hybrid_jax.checkpoint.draft import Draft
from hybrid_jax.checkpoint.opened import open_checkpoint

Told = Callable[[int, str], None]


def run(
    conversion: Conversion,
    draft: Draft,
    process: tuple[int, int],
    shares: Sequence[Sequence[int]],
    told: Told,
) -> int:
    """Write all units: the first share here, each other one in a process of its own.

    `told` hears of bytes and a name as they are written. Returns the most memory of all processes
    together. Raises what the first one raises that fails; then the others are stopped.
    """
    mine, *others = [share for share in shares if share] or [[]]
    lock = threading.Lock()

    def hear(count: int, name: str) -> None:
        with lock:
            told(count, name)

    started: list[_Worker] = []
    try:
        for share in others:
            started.append(_Worker(conversion, draft, process, share, hear))

        def written(info) -> None:
            hear(info.nbytes, info.name)
            for worker in started:
                worker.check()

        write(conversion, draft, mine, written)
        for worker in started:
            worker.wait()
    finally:
        for worker in started:
            worker.stop()
    return peak_rss_bytes() + sum(worker.peak for worker in started)


def write(conversion: Conversion, draft: Draft, numbers: Sequence[int], told) -> None:
    """Write units one after the other and record each."""
    # Thousands of rules, and all of JAX, stay: to look through them took a seventh of the time.
    gc.freeze()
    try:
        for number in numbers:
            draft.check()
            draft.record(number, conversion.write(draft.content, number, told))
    finally:
        gc.unfreeze()


def peak_rss_bytes() -> int:
    """Most memory that this process ever held."""
    with contextlib.suppress(OSError):
        # getrusage would count what the process was before it began this program.
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


class _Worker:
    """A process at work, and the thread that listens to it."""

    def __init__(self, conversion: Conversion, draft: Draft, process, numbers, told: Told):
        # Conversion needs no accelerator, and only one process could have it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            # -P: the working directory, which may be a model from the net, is no place for modules.
            [sys.executable, "-P", "-c", f"import sys, {__name__} as w; sys.exit(w.main())"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            # Ctrl-C is for the one that started them.
            start_new_session=True,
        )
        self.peak = 0
        self._error: Exception | None = None
        self._told = told
        order = {
            "job": dataclasses.asdict(conversion.job),
            "step": conversion.checkpoint.step,
            "dst": str(draft.dst),
            "origin": conversion.origin.digest,
            "process": process,
            "numbers": list(numbers),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def check(self) -> None:
        """Raise its error, if it has failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until it has done its share; raises its error."""
        self._listener.join()
        self.check()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        is_done = False
        for line in self._process.stdout:
            said = json.loads(line)
            if "error" in said:
                self._error = (ValueError if said["is_input"] else OSError)(said["error"])
                return
            if "peak" in said:
                self.peak, is_done = said["peak"], True
            else:
                self._told(said["bytes"], said["name"])
        if not is_done:
            code = self._process.wait()
            self._error = OSError(
                f"A worker of this conversion ended with exit status {code}, perhaps for want of "
                "memory. Fewer --workers need less."
            )


def main() -> int:
    """What a worker does."""
    order = json.loads(sys.stdin.readline())
    # Whatever libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(**said) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        _obey(order, say)
    except Exception as error:
        say(error=str(error) or repr(error), is_input=isinstance(error, ValueError))
        return 2
    say(peak=peak_rss_bytes())
    return 0


def _obey(order: dict, say) -> None:
    with open_checkpoint(order["job"]["src"], order["step"]) as checkpoint:
        conversion = Conversion(Job(**order["job"]), checkpoint)
        if conversion.origin.digest != order["origin"]:
            raise ValueError(f"{checkpoint.folder} has changed since the conversion began.")
        draft = Draft(pathlib.Path(order["dst"]), conversion.origin, *order["process"])
        written = lambda info: say(bytes=info.nbytes, name=info.name)
        write(conversion, draft, order["numbers"], written)


def _end_with_parent() -> None:
    sys.stdin.read()
    # Another start may go on with the work at once.
    os._exit(1)
