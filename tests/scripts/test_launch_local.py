"""Processes on one machine: what they are started with, how they are told and how they end."""

import itertools
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from scripts.launch import local

SCRIPT = pathlib.Path(local.__file__)
HOSTILE = """runs/it's "mine" $HOME; a\nb"""


def program(text: str) -> list[str]:
    return ["--", sys.executable, "-c", text]


def dry_run(capsys, *options: str) -> list[tuple[dict[str, str], list[str]]]:
    """Environment and command of each process, as a shell would understand them."""
    assert local.main(["--dry-run", *options]) == 0
    # Comments are lines of their own, and stand outside of every quoted word.
    words = shlex.split(capsys.readouterr().out, comments=True)
    cuts = [index for index, word in enumerate(words) if word == "env"] + [len(words)]
    found = []
    for begin, end in itertools.pairwise(cuts):
        line = words[begin + 1 : end]
        first = next(index for index, word in enumerate(line) if "=" not in word)
        found.append((dict(word.split("=", 1) for word in line[:first]), line[first:]))
    return found


def test_a_dry_run_shows_what_each_process_gets(capsys, monkeypatch):
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false {flag}=8")
    words = ["train", "--preset", "nano", "--out", HOSTILE]
    processes = dry_run(capsys, "--processes", "3", "--devices", "4", "--", *words)
    assert len(processes) == 3
    for index, (environment, command) in enumerate(processes):
        assert environment["JAX_PROCESS_ID"] == str(index)
        assert environment["JAX_NUM_PROCESSES"] == "3"
        assert environment["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {flag}=4"
        assert command == [sys.executable, "-m", "hybrid_jax.cli", *words]
    addresses = {environment["JAX_COORDINATOR_ADDRESS"] for environment, _ in processes}
    (address,) = addresses
    assert address.startswith("127.0.0.1:") and int(address.partition(":")[2]) > 0


def test_gpus_are_dealt_out_in_order(capsys, monkeypatch):
    options = ("--platform", "cuda", "--processes", "2", "--devices", "2", "--", "true")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    dealt = [process[0]["CUDA_VISIBLE_DEVICES"] for process in dry_run(capsys, *options)]
    assert dealt == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5, 3,GPU-1a,0")
    dealt = [process[0]["CUDA_VISIBLE_DEVICES"] for process in dry_run(capsys, *options)]
    assert dealt == ["7,5", "3,GPU-1a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "nothing to run"),
        (["--"], "nothing to run"),
        (["--processes", "0", "--", "true"], "--processes must be at least 1; got 0"),
        (["--devices", "-1", "--", "true"], "--devices must be at least 1; got -1"),
        (["--port", "70000", "--", "true"], "port 70000"),
        (["--", "no-such-program"], "no-such-program"),
        (["--platform", "cuda", "--", "true"], "2 processes x 4 devices are 8 GPUs.* names 3"),
        (["--logs", str(SCRIPT), "--", "true"], "local.py"),
    ],
)
def test_bad_input_says_what_to_do(options, message, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert local.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_a_port_in_use_is_refused_before_anything_starts(capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert local.main(["--port", str(port), *program("print('started')")]) == 2
    out, err = capsys.readouterr()
    assert f"port {port}" in err and not out


def start(folder: pathlib.Path, *options: str) -> subprocess.Popen:
    """The launcher as a terminal starts it: in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--logs", str(folder / "logs"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_process_0_is_shown_and_both_are_logged(tmp_path):
    ask = "import os; e = os.environ; print(e['JAX_PROCESS_ID'], e['JAX_COORDINATOR_ADDRESS'])"
    launcher = start(tmp_path, *program(ask))
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (0, "")
    logs = [(tmp_path / "logs" / f"process-{index}.log").read_text() for index in (0, 1)]
    (zero, address), (one, same) = (log.split() for log in logs)
    assert (zero, one, same) == ("0", "1", address)
    assert out.splitlines()[1:] == logs[0].splitlines()


def test_who_ends_to_be_continued_does_not_end_the_others(tmp_path):
    """The first process may still write the checkpoint that they are to continue from."""
    slow = "import os, time; time.sleep(int(os.environ['JAX_PROCESS_ID']) == 0); "
    launcher = start(tmp_path, *program(slow + "print('written', flush=True); os._exit(75)"))
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err) == (75, "") and "written" in out


# Counts requests to stop until none has come for half a second.
COUNTING = """
import os, signal, time
count = 0
def handle(number, frame):
    global count
    count += 1
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
print("ready")
while not count:
    time.sleep(0.01)
time.sleep(0.5)
print("asked", count)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(number, tmp_path):
    launcher = start(tmp_path, *program(COUNTING))
    logs = [tmp_path / "logs" / f"process-{index}.log" for index in (0, 1)]
    try:
        until = time.monotonic() + 60
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            assert time.monotonic() < until and launcher.poll() is None
            time.sleep(0.02)
        # A terminal sends Ctrl-C to the whole group, `kill` a signal to one process.
        if number == signal.SIGINT:
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        assert launcher.wait(timeout=60) == 0
    finally:
        launcher.kill()
    assert [log.read_text().split() for log in logs] == [["ready", "asked", "1"]] * 2


# Process 1 ends in the given way once process 0 has said that it lives and hears no request to end.
STUBBORN = """
import os, pathlib, signal, sys, time
alive = pathlib.Path(os.environ["ALIVE"])
if os.environ["JAX_PROCESS_ID"] == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    alive.write_text(str(os.getpid()))
    time.sleep(600)
while not alive.exists() or not alive.read_text():
    time.sleep(0.01)
print("the reason")
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [
        ("sys.exit(7)", 7, "with exit code 7"),
        ("sys.stdout.flush(); os.kill(os.getpid(), 9)", 137, "by SIGKILL"),
    ],
)
def test_one_that_fails_ends_the_others(end, code, how, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
    monkeypatch.setenv("ALIVE", str(tmp_path / "alive"))
    options = ["--logs", str(tmp_path), *program(STUBBORN.format(end=end))]
    assert local.main(options) == code
    err = capsys.readouterr().err
    assert f"process 1 ended {how}; the 1 still running are ended too" in err
    assert err.endswith("process-1.log\n  | the reason\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "alive").read_text()), 0)
