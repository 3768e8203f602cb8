"""Several processes on this machine that train together, as the hosts of a cluster would.

    python scripts/launch/local.py --processes 2 --devices 4 -- train --preset nano ...

They find one another by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. What process
0 prints is shown; what each of them prints is in a log. A signal is passed on to all of them, once,
so that a run ends with a checkpoint; when one fails, the others are ended, for they would wait for
it for ever.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing

import tyro

# How long the others have to end once one has failed. They can hardly use it: a step that exchanges
# anything with the one that is gone does not end.
GRACE_SECONDS = 10.0
# Of one that ended in order, to be started again: the others do the same by themselves.
_START_AGAIN = 75
_POLL_SECONDS = 0.05
_LINES_SHOWN = 15
# A closed terminal asks to stop as well; Python has no handler of its own for it.
_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
_DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Args:
    """Start processes on this machine that train together. What they run comes after `--`.

    Ctrl-C or SIGTERM asks all of them to stop, a second one insists, a third one kills. Exit code:
    0 if all ended well, 75 if they ended so that a start with --resume goes on (SIGTERM, or a step
    that hung), that of the first that failed (128 and the signal's number if a signal ended it), 2
    for bad input."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """What each runs; `train` means `hybrid-jax train`."""
    processes: int = 2
    """How many."""
    devices: int = 4
    """Devices of each."""
    platform: typing.Literal["cpu", "cuda"] = "cpu"
    """cpu: simulated devices. cuda: GPUs, in the order of CUDA_VISIBLE_DEVICES if that is set."""
    port: int | None = None
    """Where process 0 listens for the others; a free port if not given."""
    logs: pathlib.Path | None = None
    """Directory of process-0.log, process-1.log, ...; a new temporary one if not given."""
    dry_run: bool = False
    """Print each process's environment and command, and start nothing."""


class Process(typing.NamedTuple):
    """What one process is started with."""

    environment: dict[str, str]
    """What differs from the launcher's own."""
    command: list[str]


def main(argv: list[str]) -> int:
    """The launcher's exit code; see `Args`."""
    try:
        args = tyro.cli(Args, args=argv, prog="local.py")
        processes = plan(args, os.environ)
        if args.dry_run:
            print(f"# ends with exit code {_START_AGAIN} if a start with --resume should go on")
            for index, process in enumerate(processes):
                print(f"# process {index} of {args.processes}")
                assignments = [f"{name}={value}" for name, value in process.environment.items()]
                print(shlex.join(["env", *assignments, *process.command]))
            return 0
        logs = pathlib.Path(args.logs or tempfile.mkdtemp(prefix="hybrid-jax-"))
        logs.mkdir(parents=True, exist_ok=True)
        print(f"{args.processes} processes; their logs are in {logs}.", flush=True)
        return Group(logs).run(processes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(args: Args, environment: typing.Mapping[str, str]) -> list[Process]:
    """What each process is started with; ValueError if it cannot be had, with the numbers."""
    if not args.command:
        raise ValueError(
            "there is nothing to run; put -- before it, as in "
            "'local.py --processes 2 --devices 4 -- train --preset nano --data TEXT --out RUN'."
        )
    for name in ("processes", "devices"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}.")
    if args.platform == "cuda":
        gpus = _gpus(args, environment.get("CUDA_VISIBLE_DEVICES"))
    command = list(args.command)
    if command[0] == "train":
        command = [sys.executable, "-m", "hybrid_jax.cli", *command]
    address = f"127.0.0.1:{_free_port(args.port)}"
    processes = []
    for index in range(args.processes):
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(args.processes),
            "JAX_PROCESS_ID": str(index),
            "JAX_PLATFORMS": args.platform,
            # Logs say at once what happens.
            "PYTHONUNBUFFERED": "1",
        }
        if args.platform == "cuda":
            first = index * args.devices
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + args.devices])
        else:
            own["XLA_FLAGS"] = _simulated(environment.get("XLA_FLAGS", ""), args.devices)
        processes.append(Process(own, command))
    return processes


def _gpus(args: Args, visible: str | None) -> list[str]:
    wanted = args.processes * args.devices
    if visible is None:
        return [str(index) for index in range(wanted)]
    gpus = [name.strip() for name in visible.split(",") if name.strip()]
    if len(gpus) < wanted:
        raise ValueError(
            f"{args.processes} processes x {args.devices} devices are {wanted} GPUs, and "
            f"CUDA_VISIBLE_DEVICES={visible} names {len(gpus)}. Ask for fewer, or name more."
        )
    return gpus


def _simulated(flags: str, devices: int) -> str:
    """XLA's flags with this many CPU devices."""
    others = [flag for flag in flags.split() if flag.partition("=")[0] != _DEVICE_COUNT]
    return " ".join([*others, f"{_DEVICE_COUNT}={devices}"])


def _free_port(wanted: int | None) -> int:
    """The port, or one nobody listens on. Another program may still take it before process 0 does:
    then that fails, and with it all."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"port {wanted} cannot be listened on ({error}); leave --port out to have a free "
                "one chosen."
            ) from error
        return probe.getsockname()[1]


class Group:
    """Processes that are started, told and ended together."""

    def __init__(self, logs: pathlib.Path):
        self._logs = logs
        self._children: list[subprocess.Popen] = []
        self._signals: list[int] = []
        """Received; those from `_told` on are not passed on yet."""
        self._told = 0

    def run(self, processes: list[Process]) -> int:
        """Start all, wait for all; the exit code."""
        with self._listening(), contextlib.ExitStack() as files:
            try:
                for index, process in enumerate(processes):
                    self._start(index, process, files)
                failed = self._first_failure()
            finally:
                self._end()
        if failed is None:
            return max(child.returncode for child in self._children)
        code = self._children[failed].returncode
        return code if code > 0 else 128 - code

    @contextlib.contextmanager
    def _listening(self):
        former = {
            number: signal.signal(number, lambda number, frame: self._signals.append(number))
            for number in _PASSED_ON
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _log(self, index: int) -> pathlib.Path:
        return self._logs / f"process-{index}.log"

    def _start(self, index: int, process: Process, files: contextlib.ExitStack) -> None:
        log = files.enter_context(self._log(index).open("wb"))
        child = subprocess.Popen(
            process.command,
            env=os.environ | process.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if index == 0 else log,
            stderr=subprocess.STDOUT,
            # In a session of its own: the terminal's Ctrl-C would reach it a second time.
            start_new_session=True,
        )
        self._children.append(child)
        if index == 0:
            shown = threading.Thread(target=_show, args=(child.stdout, log), daemon=True)
            shown.start()
            # Whatever outlives process 0 and holds its output is not waited for.
            files.callback(shown.join, 1.0)

    def _first_failure(self) -> int | None:
        """Wait until all have ended in order, or one has failed: which."""
        while True:
            self._pass_on()
            codes = [child.poll() for child in self._children]
            bad = (index for index, code in enumerate(codes) if code not in (None, 0, _START_AGAIN))
            failed = next(bad, None)
            if failed is not None:
                self._report(failed)
                return failed
            if None not in codes:
                return None
            time.sleep(_POLL_SECONDS)

    def _pass_on(self) -> None:
        while self._told < len(self._signals):
            number = _PASSED_ON[signal.Signals(self._signals[self._told])]
            self._told += 1
            self._tell(signal.SIGKILL if self._told > 2 else number)

    def _tell(self, number: int) -> None:
        for child in self._children:
            # Does nothing to one that has ended.
            child.send_signal(number)

    def _report(self, failed: int) -> None:
        code = self._children[failed].returncode
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        running = sum(child.poll() is None for child in self._children)
        others = f"; the {running} still running are ended too" if running else ""
        # What process 0 said is on the screen.
        lines = self._log(failed).read_text(errors="replace").splitlines() if failed else []
        ending = "".join(f"\n  | {line}" for line in lines[-_LINES_SHOWN:])
        print(
            f"error: process {failed} ended {how}{others}. Its log: {self._log(failed)}{ending}",
            file=sys.stderr,
            flush=True,
        )

    def _end(self) -> None:
        """Ask those that still run to end, and kill those that do not."""
        running = [child for child in self._children if child.poll() is None]
        # Who has been asked already is not asked again: a second signal means "at once".
        if not self._told:
            for child in running:
                child.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for child in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
        for child in running:
            child.kill()
            child.wait()


def _show(pipe: typing.IO[bytes], log: typing.IO[bytes]) -> None:
    """Copy what comes to the log and to standard output."""
    with pipe, contextlib.suppress(ValueError):
        # ValueError: the log was closed, for the launcher is about to end.
        while some := os.read(pipe.fileno(), 1 << 16):
            log.write(some)
            log.flush()
            sys.stdout.buffer.write(some)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
