"""Start real processes that join one computation on this machine, each with simulated devices."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def start(count: int, devices: int, arguments, logs: pathlib.Path, environment=()) -> list:
    """`python ARGUMENTS` in `count` processes; what they print goes to LOGS/0, LOGS/1, ...

    What Gloo, the transport, says of itself goes to LOGS/0.transport, LOGS/1.transport, ...
    """
    logs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'sharding' / 'apart'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    started = []
    for process in range(count):
        with (
            (logs / str(process)).open("w") as log,
            (logs / f"{process}.transport").open("w") as transport,
        ):
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env=os.environ | shared | dict(environment) | {"JAX_PROCESS_ID": str(process)},
                    stdout=transport,
                    stderr=log,
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
    """What a process printed, empty lines left out."""
    text = (logs / str(process)).read_text(errors="replace")
    return [line for line in text.splitlines() if line]
