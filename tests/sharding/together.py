"""Start real processes that join one computation on this machine, each with simulated devices."""

import os
import pathlib
import re
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def start(count: int, devices: int, arguments, logs: pathlib.Path, environment=()) -> list:
    """`python ARGUMENTS` in `count` processes; what they print goes to LOGS/0, LOGS/1, ..."""
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    started = []
    for process in range(count):
        with (logs / str(process)).open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=os.environ | shared | dict(environment) | {"JAX_PROCESS_ID": str(process)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                )
            )
    return started


def wait(started, seconds: float) -> list[int]:
    """Exit codes; whoever has not ended by then is killed, and subprocess.TimeoutExpired raised."""
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def lines(logs: pathlib.Path, process: int) -> list[str]:
    """What a process printed, without what the transport says of itself.

    Its threads write at once, and then a line may begin within another's.
    """
    text = (logs / str(process)).read_text(errors="replace")
    of_transport = re.compile(r"^\[Gloo\]|is connected to \d+ peer ranks")
    return [line for line in text.splitlines() if line and not of_transport.search(line)]
