"""Predictors without a model: what they say is computed from the tokens, by rules."""

import re
from collections.abc import Callable

import numpy as np

from hybrid_jax.evaluation.haystack import Encoder
from hybrid_jax.evaluation.predictor import Scored, silent

CERTAINTY = 0.9


class HandMade:
    """Gives `best(tokens_T)` [T], the next token in each place, the probability `CERTAINTY`.

    All other tokens share the rest evenly.
    """

    def __init__(self, vocab_size: int, best: Callable[[np.ndarray], np.ndarray]):
        self.vocab_size = vocab_size
        self._best = best

    def score(self, tokens, targets, tick=silent):
        rest = np.log((1 - CERTAINTY) / (self.vocab_size - 1))
        found = []
        for row, wanted in zip(tokens, targets, strict=True):
            best = self._best(np.asarray(row)).astype(np.int32)
            found.append(Scored(np.where(best == wanted, np.log(CERTAINTY), rest), best))
        tick(len(found))
        return found

    def generate(self, prompts, max_new_tokens, *, eos_id=None, tick=silent, **sampling):
        assert not sampling
        rows = [np.asarray(prompt) for prompt in prompts]
        for _ in range(max_new_tokens):
            rows = [np.append(row, self._best(row)[-1]) for row in rows]
        tick(len(rows))
        return [row[-max_new_tokens:] for row in rows]


def first_successor(tokens_T: np.ndarray) -> np.ndarray:
    """What followed the first occurrence of each token: an ideal associative memory."""
    _, first, inverse = np.unique(tokens_T, return_index=True, return_inverse=True)
    return np.append(tokens_T, 0)[first[inverse] + 1]


def reader(tokenizer: Encoder) -> Callable[[np.ndarray], np.ndarray]:
    """Reads the special magic numbers in a prompt of `evaluation.haystack`, and says them."""

    def best(tokens_T: np.ndarray) -> np.ndarray:
        out = np.zeros(len(tokens_T), np.int64)
        # Nothing is asked further up.
        for t in range(max(0, len(tokens_T) - 60), len(tokens_T)):
            out[t] = next_token(tokens_T[: t + 1].tolist())
        return out

    def next_token(ids: list[int]) -> int:
        text = tokenizer.decode(ids)
        asked = re.findall(r"\nWhat (?:is|are) the special magic (.*) numbers?\? (.*:)", text)
        if not asked:
            return 0
        question = f"{asked[-1][1]}"
        cities = re.split(r", | and ", asked[-1][0].replace("numbers ", ""))
        numbers = [re.findall(rf"magic {city} number is: (\d+)\.", text)[0] for city in cities]
        *first, last = numbers
        answer = f" {', '.join(first)} and {last}" if first else f" {last}"
        told = tokenizer.encode(answer, add_special_tokens=False).ids
        said = next(
            n for n in range(len(ids)) if tokenizer.decode(ids[: len(ids) - n]).endswith(question)
        )
        return told[said] if said < len(told) else 0

    return best
