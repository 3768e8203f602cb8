"""A needle of tokens in a haystack of tokens, by length and depth: retrieval without language."""

import numpy as np

from hybrid_jax.config.evaluation import TokenNeedle
from hybrid_jax.data import recall as made_up
from hybrid_jax.evaluation.predictor import Predictor, Tick, silent
from hybrid_jax.evaluation.recall import vocabulary


def evaluate(predictor: Predictor, settings: TokenNeedle, seed: int, tick: Tick = silent) -> dict:
    """{"cells": [{"length", "depth", "exact", "tokens", "logprob", "samples"}]}.

    `exact` is the share of rows in which greedy decoding gives the whole value, `tokens` that of
    the value's tokens which are the most likely ones after those before them, `logprob` the mean
    over them. Raises ValueError if the vocabulary or a length is too small.
    """
    vocab_size = vocabulary(predictor, settings.vocab_size)
    cells = []
    for length in sorted(settings.lengths):
        depths = [depth for depth in settings.depths for _ in range(settings.samples)]
        made = made_up.needles(
            seed, [(depth,) for depth in depths], length, vocab_size, settings.value_length
        )
        scored = predictor.score(made.tokens_BT, made.targets_BT, tick)
        asked_BT = made.weights_BT > 0
        # Every row asks for as many tokens, so they are a table.
        shape = (len(settings.depths), settings.samples, settings.value_length)
        best_BT = np.stack([row.best_T for row in scored])
        right = (best_BT == made.targets_BT)[asked_BT].reshape(shape)
        logprob = np.stack([row.logprob_T for row in scored])[asked_BT].reshape(shape)
        for idx, depth in enumerate(settings.depths):
            cells.append(
                {
                    "length": length,
                    "depth": depth,
                    "exact": float(right[idx].all(-1).mean()),
                    "tokens": float(right[idx].mean()),
                    "logprob": float(logprob[idx].mean()),
                    "samples": settings.samples,
                }
            )
    return {"cells": cells}
