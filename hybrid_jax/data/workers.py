"""The same task for many jobs, in this process or in several that may die.

Not `concurrent.futures`: its workers share queues with locks, and one that is killed while it holds
such a lock leaves the others, and whoever waits for them, waiting for ever.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection as connections
from typing import Any, NamedTuple

# A job that so many workers have died of is what kills them.
_MOST_DEATHS = 3


def run(task: Callable, jobs: Sequence, num_workers: int, describe: Callable[..., str]) -> Iterator:
    """Results of `task(job)`, as they come, in any order.

    The job of a worker that dies is done again by another; a job must be one that can be. Raises
    OSError, saying `describe(job)`, when a job's workers die again and again, and whatever a task
    raises.
    """
    if num_workers <= 0:
        yield from map(task, jobs)
        return
    waiting = deque(range(len(jobs)))
    deaths: Counter[int] = Counter()
    busy: dict[connections.Connection, tuple[_Worker, int]] = {}
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and (idle or len(busy) < num_workers):
                worker = _living(idle) or _Worker(task)
                number = waiting.popleft()
                busy[worker.pipe] = worker, number
                worker.give(jobs[number])
            for pipe in connections.wait(list(busy)):
                assert isinstance(pipe, connections.Connection)
                worker, number = busy.pop(pipe)
                answer = worker.take()
                if answer is None:
                    deaths[number] += 1
                    _check(deaths[number], describe, jobs[number])
                    waiting.appendleft(number)
                    continue
                idle.append(worker)
                if answer.error is not None:
                    raise answer.error
                yield answer.result
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.end()


def _living(idle: "list[_Worker]") -> "_Worker | None":
    """One that has nothing to do; those that died of nothing are done with."""
    while idle:
        worker = idle.pop()
        if worker.is_alive:
            return worker
        worker.end()
    return None


def _check(deaths: int, describe: Callable[..., str], job) -> None:
    if deaths >= _MOST_DEATHS:
        raise OSError(
            f"A worker died {deaths} times on {describe(job)}. Is there enough memory? What is "
            "done is kept; the same command goes on from there."
        )


class _Answer(NamedTuple):
    """What came of a job."""

    result: Any
    error: Exception | None


class _Worker:
    """A process with a pipe of its own: what happens to it concerns no other."""

    def __init__(self, task: Callable):
        # Not fork: this process has threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        # Or its end would stay open when it dies.
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def give(self, job) -> None:
        # If it is dead, `take` will say so.
        with contextlib.suppress(OSError):
            self.pipe.send(job)

    def take(self) -> "_Answer | None":
        """What came of its job; None if it has died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return None

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: connections.Connection, task: Callable) -> None:
    """What a worker does until its parent has no more jobs, or is gone."""
    # One process a core already: threads of the tokenizer would only get in one another's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is for the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _Answer(task(job), None)
        except Exception as error:
            answer = _Answer(None, error)
        try:
            pipe.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError):
            # An error that cannot travel.
            pipe.send(_Answer(None, RuntimeError(repr(answer.error))))
