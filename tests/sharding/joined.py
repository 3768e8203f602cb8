"""What each of the processes that `test_processes.py` starts does: `python joined.py CASE`."""

import os
import signal
import sys
import time

from sharding import processes


def agree() -> None:
    """What the first one makes goes to all; the largest number counts; one error is everybody's."""
    import jax

    from sharding.agreement import Largest

    me = jax.process_index()
    largest = Largest()
    assert largest.result() == 0
    largest.hand_in(3 + me)
    print(processes.from_first(lambda: f"made by {me}"), largest.result(), processes.is_first())
    processes.all_pass(lambda: None)
    assert processes.gather(f"of {me}") == ["of 0", "of 1"]

    def check():
        if me == 1:
            raise ValueError("not here")

    processes.all_pass(check)


def compile_apart() -> None:
    """The second one compiles for longer; a program without any exchange shows who waited."""
    import jax

    def doubled(x):
        time.sleep(3 * jax.process_index())
        return 2 * x

    call = processes.Together(jax.jit(doubled))
    processes.all_pass(lambda: None)
    begin = time.monotonic()
    assert call(4) == 8
    waited = time.monotonic() - begin
    begin = time.monotonic()
    assert call(5) == 10
    print(waited > 2.5, time.monotonic() - begin < 2)


def first_fails() -> None:
    """An error of the first one ends all."""

    def make():
        raise FileNotFoundError("no text")

    processes.from_first(make)


def one_errs() -> None:
    """One process ends with an error, while the other one waits for it."""
    import jax

    if jax.process_index() == 1:
        raise ValueError("mine alone")
    processes.from_first(lambda: signal.pause())


def one_dies() -> None:
    """One process is killed, while the other one waits for it."""
    import jax

    processes.from_first(lambda: "")
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.all_pass(lambda: None)


def main(case: str, heartbeat_seconds: str) -> int:
    processes.HEARTBEAT_SECONDS = int(heartbeat_seconds)
    assert processes.start()
    try:
        globals()[case]()
    except Exception as error:
        print(f"error: {error}", flush=True)
        processes.part(2)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
