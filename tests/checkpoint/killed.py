"""What tests of resuming start: work in processes of their own, some of which are killed.

`python -m tests.checkpoint.killed CASE ...` imports once and forks for every start. It prints what
happened as JSON.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import hybrid_jax
from hybrid_jax.checkpoint import convert, draft, manifest
from tests.checkpoint.models import model_of

ROOT = pathlib.Path(__file__).parents[2]
UNIT_BYTES = 4000


def run(*arguments) -> dict:
    """What it answers."""
    command = [sys.executable, "-m", "tests.checkpoint.killed", *map(str, arguments)]
    # A user's process: without the devices that tests simulate.
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = plain | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def begin(dst: pathlib.Path, *arguments, at: int | None = None, **options):
    """Convert in a new process, as `fork` does."""
    return fork(dst, at, lambda: convert(arguments[0], dst, *arguments[1:], **options).written)


def fork(dst: pathlib.Path, at: int | None, work):
    """Work in a new process, killed at the `at`th thing that it does to files: (pid, answer)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        answer = {}
        try:
            count = _watch(dst, at)
            before = io()
            written = work()
            passed = {name: value - before[name] for name, value in io().items()}
            answer = {"done": count[0], "io": passed, "written": written}
        except BaseException as error:
            answer = {"error": repr(error)}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    return pid, reader


def end(started) -> dict:
    """What it answers; {"killed": True} if it was."""
    pid, reader = started
    with os.fdopen(reader) as answer:
        said = answer.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return {"killed": os.WTERMSIG(status) == signal.SIGKILL}
    return json.loads(said)


def kill(src: str, out: str, format: str, trials: str, seed: str) -> dict:
    """Trials of one kill at a random moment each, and a second start."""
    folder, draw, found = pathlib.Path(out), random.Random(int(seed)), []
    options = {"shard_bytes": UNIT_BYTES, "group_bytes": UNIT_BYTES}
    whole = end(begin(folder / "whole", src, format, **options))
    for trial in range(int(trials)):
        dst = folder / f"trial-{trial}"
        at = draw.randrange(whole["done"]) + 1
        first = end(begin(dst, src, format, at=at, **options))
        is_there, work = dst.exists(), draft.place(dst)
        if is_there:
            manifest.verify(dst)
        units = len(list((work / "units").glob("*.json")))
        second = end(begin(dst, src, format, **options))
        manifest.verify(dst)
        found.append(
            {
                "at": at,
                "first": first,
                "second": second,
                "was_there": is_there,
                "units": units,
            }
        )
    return {"whole": whole, "trials": found}


def save(out: str, format: str, trials: str, seed: str) -> dict:
    """Saves that are killed once each at a random moment; then all go on in one process."""
    folder, draw, found = pathlib.Path(out), random.Random(int(seed)), []

    def start(dst: pathlib.Path) -> dict:
        said: list[str] = []
        model = model_of()
        before = io()["written"]
        hybrid_jax.save(model, dst, format, shard_bytes=UNIT_BYTES, note=said.append)
        return {"bytes": io()["written"] - before, "said": said}

    whole = end(fork(folder / "whole", None, lambda: start(folder / "whole")))
    for trial in range(int(trials)):
        dst, at = folder / f"trial-{trial}", draw.randrange(whole["done"]) + 1
        first = end(fork(dst, at, lambda dst=dst: start(dst)))
        units = len(list((draft.place(dst) / "units").glob("*.json")))
        found.append({"at": at, "first": first, "was_there": dst.exists(), "units": units})
    # JAX begins here. What began before would not survive a fork.
    for trial, each in enumerate(found):
        try:
            each["second"] = start(folder / f"trial-{trial}")
        except ValueError as error:
            each["second"] = {"error": str(error)}
    return {"whole": whole["written"], "trials": found}


def together(src: str, out: str, format: str, shard_bytes: str) -> dict:
    """Two processes at once."""
    dst = pathlib.Path(out) / "dst"
    started = [
        begin(dst, src, format, process=process, of=2, shard_bytes=int(shard_bytes))
        for process in range(2)
    ]
    return {"processes": [end(each) for each in started]}


def _watch(dst: pathlib.Path, at: int | None) -> list[int]:
    """Count what is done to files below the destination's folder; kill at the `at`th."""
    count, folder = [0], str(dst.parent)

    def happens() -> None:
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path = arguments[0]
            if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder):
                happens()

    sys.addaudithook(hook)
    pwrite = os.pwrite

    def counted(*arguments):
        happens()
        return pwrite(*arguments)

    os.pwrite = counted
    return count


def io() -> dict[str, int]:
    """Bytes that this process has read and written so far."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    found = dict(line.split(": ") for line in lines)
    return {"read": int(found["rchar"]), "written": int(found["wchar"])}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
