"""How many key-value pairs a model keeps: multi-query associative recall."""

import numpy as np

from hybrid_jax.config.evaluation import Recall
from hybrid_jax.data.recall import associative_recall
from hybrid_jax.evaluation.buckets import by_power_of_two
from hybrid_jax.evaluation.predictor import Predictor, Tick, silent


def evaluate(predictor: Predictor, settings: Recall, seed: int, tick: Tick = silent) -> dict:
    """Share of the questions whose most likely token, of the whole vocabulary, is the answer.

    Returns {"pairs": [{"pairs", "recall", "chance", "logprob", "questions", "distances": [{"first",
    "last", "recall", "questions"}]}]}. `chance` is that of one of the row's values at random,
    `logprob` the mean of the answers. Raises ValueError if the vocabulary or the length is too
    small.
    """
    vocab_size = vocabulary(predictor, settings.vocab_size)
    found = []
    for num_pairs in sorted(settings.pairs):
        made = associative_recall(seed, [num_pairs] * settings.rows, settings.length, vocab_size)
        scored = predictor.score(made.tokens_BT, made.targets_BT, tick)
        asked_BT = made.weights_BT > 0
        right = np.stack([row.best_T for row in scored])[asked_BT] == made.targets_BT[asked_BT]
        logprob = np.stack([row.logprob_T for row in scored])[asked_BT]
        buckets = by_power_of_two(made.distance_BT[asked_BT], right)
        found.append(
            {
                "pairs": num_pairs,
                "recall": float(right.mean()),
                "chance": 1 / num_pairs,
                "logprob": float(logprob.mean()),
                "questions": int(asked_BT.sum()),
                "distances": [
                    {"first": b.first, "last": b.last, "recall": b.mean, "questions": b.size}
                    for b in buckets
                ],
            }
        )
    return {"pairs": found}


def vocabulary(predictor: Predictor, wanted: int | None) -> int:
    """Ids to draw from. Raises ValueError if the model has fewer than wanted."""
    if wanted is not None and wanted > predictor.vocab_size:
        raise ValueError(
            f"vocab_size={wanted} asks for ids that the model lacks: it has {predictor.vocab_size}."
        )
    return predictor.vocab_size if wanted is None else wanted


def lines(report: dict) -> list[str]:
    """The figures for a reader."""
    rows = [f"{'pairs':>6}  {'recall':>7}  {'chance':>7}  {'logprob':>8}  {'questions':>9}"]
    for each in report["pairs"]:
        rows.append(
            f"{each['pairs']:6}  {each['recall']:7.3f}  {each['chance']:7.3f}  "
            f"{each['logprob']:8.3f}  {each['questions']:9,}"
        )
    return rows
