"""The same task for many jobs, in this process or in several that may die."""

import concurrent.futures
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

# A job that was in the hands of dying workers this often is what kills them.
_MOST_DEATHS = 3


def run(task: Callable, jobs: Sequence, num_workers: int, describe: Callable[..., str]) -> Iterator:
    """Results of `task(job)`, as they come, in any order.

    Jobs of a worker that dies are done again by others; a job must be one that can be. Raises
    OSError, saying `describe(job)`, when a job's workers die again and again, and whatever a task
    raises.
    """
    if num_workers <= 0:
        yield from map(task, jobs)
        return
    waiting = list(enumerate(jobs))
    deaths: Counter[int] = Counter()
    while waiting:
        # After a death one worker at a time: then it is known which job it was.
        alone = bool(deaths)
        finished: set[int] = set()
        with concurrent.futures.ProcessPoolExecutor(
            1 if alone else num_workers,
            # Not fork: this process has threads.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_quiet,
        ) as pool:
            futures = {pool.submit(task, job): number for number, job in waiting}
            try:
                for future in concurrent.futures.as_completed(futures):
                    result = future.result()
                    finished.add(futures[future])
                    yield result
            except BrokenProcessPool:
                suspects = [number for number, _ in waiting if number not in finished]
                deaths.update(suspects[:1] if alone else suspects[:num_workers])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        waiting = [(number, job) for number, job in waiting if number not in finished]
        for number, job in waiting:
            if deaths[number] >= _MOST_DEATHS:
                raise OSError(
                    f"A worker died {_MOST_DEATHS} times on {describe(job)}. Is there enough "
                    "memory? What is done is kept; the same command goes on from there."
                )


def _quiet() -> None:
    """One process a core already: threads of the tokenizer would only get in one another's way."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
