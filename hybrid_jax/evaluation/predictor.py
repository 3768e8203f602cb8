"""What every evaluation asks of a model: score given tokens, and go on from a prompt.

Evaluations know this protocol only, so that tests put a hand-made model in a real one's place.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Ids = Sequence[int] | np.ndarray
Tick = Callable[[int], None]
"""Told how many more rows are done."""


def silent(rows: int) -> None:
    """Nobody watches."""


class Scored(NamedTuple):
    """What a model makes of the targets of one row."""

    logprob_T: np.ndarray
    """float32 natural logarithm of each target's probability."""
    best_T: np.ndarray
    """int32 the most likely token in each place."""


class Predictor(Protocol):
    """A language model with a vocabulary of `vocab_size` ids."""

    vocab_size: int

    def score(
        self, tokens: Iterable[np.ndarray], targets: Iterable[np.ndarray], tick: Tick = silent
    ) -> list[Scored]:
        """For each row of ids, how likely its targets are: target t after tokens 0 to t."""

    def generate(
        self,
        prompts: Iterable[np.ndarray],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        tick: Tick = silent,
        **sampling,
    ) -> list[np.ndarray]:
        """New ids after each prompt; greedy without `sampling` (see `inference.generate`).

        After `eos_id` a row is filled with it.
        """


def score_answers(
    predictor: Predictor,
    prompts: Iterable[Ids],
    answers: Sequence[Ids],
    tick: Tick = silent,
) -> list[Scored]:
    """How likely each answer is after its prompt, token by token; arrays of the answer's length.

    Prompts and answers hold at least one token. As every token sees the answer's true beginning,
    `best_T` equals the answer if and only if greedy decoding would give it.
    """
    rows = [np.asarray([*p, *a]) for p, a in zip(prompts, answers, strict=True)]
    scored = predictor.score([row[:-1] for row in rows], [row[1:] for row in rows], tick)
    return [
        Scored(each.logprob_T[-len(answer) :], each.best_T[-len(answer) :])
        for each, answer in zip(scored, answers, strict=True)
    ]
