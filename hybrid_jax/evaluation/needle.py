"""Needles in a haystack of text: one by length and depth, or several at once.

The sentence is that of the MiniMax-01 report (arXiv 2501.08313), which asks for it at up to 4M
tokens: "The special magic {city} number is: {number}".
"""

import re
from collections.abc import Sequence

import numpy as np

from hybrid_jax.config.evaluation import MultiNeedle, Needle
from hybrid_jax.evaluation.haystack import Encoder, Haystack, Prompt
from hybrid_jax.evaluation.predictor import Predictor, Tick, score_answers, silent

# What a model may say before and between the numbers.
_SPARE_TOKENS = 8


def evaluate(
    predictor: Predictor, tokenizer: Encoder, settings: Needle, seed: int, tick: Tick = silent
) -> dict:
    """{"cells": [{"length", "depth", "exact", "forced", "tokens", "logprob", "samples"}]}.

    `exact` is the share of prompts after which greedy decoding says the number first, `forced` that
    in which every token of the answer is the most likely one after those before it, `tokens` the
    share of such tokens and `logprob` the mean over them: they tell small models apart that fail
    all the same. Raises ValueError as `Haystack` does.
    """
    hay = Haystack(tokenizer, settings.haystack, max(settings.lengths))
    cells = []
    for length in sorted(settings.lengths):
        prompts = [
            hay.prompt(_rng(seed, length, idx, sample), length, (depth,), settings.digits)
            for idx, depth in enumerate(settings.depths)
            for sample in range(settings.samples)
        ]
        scores = _scores(predictor, tokenizer, prompts, tick)
        for idx, depth in enumerate(settings.depths):
            own = scores[idx * settings.samples : (idx + 1) * settings.samples]
            cells.append({"length": length, "depth": depth} | _mean(own))
    return {"cells": cells}


def evaluate_many(
    predictor: Predictor, tokenizer: Encoder, settings: MultiNeedle, seed: int, tick: Tick = silent
) -> dict:
    """As `evaluate`, by length and `count`, with the needles at random depths.

    `exact` is the share of the numbers that the answer holds, in whatever order.
    """
    hay = Haystack(tokenizer, settings.haystack, max(settings.lengths))
    cells = []
    for length in sorted(settings.lengths):
        for count in sorted(settings.counts):
            prompts = []
            for sample in range(settings.samples):
                rng = _rng(seed, length, count, sample)
                depths = rng.random(count)
                prompts.append(hay.prompt(rng, length, depths, settings.digits))
            own = _scores(predictor, tokenizer, prompts, tick)
            cells.append({"length": length, "count": count} | _mean(own))
    return {"cells": cells}


def _scores(predictor: Predictor, tokenizer: Encoder, prompts: Sequence[Prompt], tick: Tick):
    """(exact, forced, tokens, logprob) of each prompt."""
    ids = [np.asarray(prompt.ids) for prompt in prompts]
    # One number of new tokens for all prompts, and so one program.
    most = max(len(prompt.answer) for prompt in prompts) + _SPARE_TOKENS
    said = predictor.generate(ids, most, tick=tick)
    scored = score_answers(predictor, ids, [prompt.answer for prompt in prompts], tick)
    found = []
    for prompt, new, each in zip(prompts, said, scored, strict=True):
        right = each.best_T == np.asarray(prompt.answer)
        exact = _share_said(tokenizer.decode(new.tolist()), prompt.numbers)
        found.append((exact, right.all(), right.mean(), each.logprob_T.mean()))
    return np.array(found, np.float64)


def _share_said(text: str, numbers: tuple[str, ...]) -> float:
    """The share of `numbers` among those that `text` begins with, as many as were asked for."""
    first = re.findall(r"\d+", text)[: len(numbers)]
    return sum(number in first for number in numbers) / len(numbers)


def _mean(scores) -> dict:
    means = dict(zip(("exact", "forced", "tokens", "logprob"), scores.mean(0).tolist()))
    return means | {"samples": len(scores)}


def _rng(*numbers: int):
    return np.random.default_rng([*numbers, 0x4EED])
