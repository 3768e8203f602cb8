"""The model as a predictor: what it says is what the logits say, alone or in any batch."""

import numpy as np
import pytest

from hybrid_jax import inference
from hybrid_jax.evaluation.model_predictor import ModelPredictor
from hybrid_jax.evaluation.predictor import score_answers
from tests.model import configs

# float32 with sums in another order, relative to logits of about 5.
CLOSE = {"rtol": 0, "atol": 2e-4}
# Four groups of one or two rows; the longest takes two chunks of 512.
LENGTHS = (70, 3, 40, 520, 24, 50, 5)


def logits_of(row):
    """Logits of the whole row by the model's own forward pass; one program for all rows."""
    padded = np.zeros((1, 520), np.int32)
    padded[0, : len(row)] = row
    return configs.forward("odd")(padded)[0, : len(row)]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_scores_are_those_of_the_logits_alone_and_in_batches():
    rows = [configs.tokens(1, length + 1, seed=length)[0] for length in LENGTHS]
    ticks = []
    predictor = ModelPredictor(configs.built("odd"), batch_size=2, longest=1024)
    found = predictor.score([row[:-1] for row in rows], [row[1:] for row in rows], ticks.append)
    assert ticks == [2, 2, 2, 1]
    for row, each in zip(rows, found, strict=True):
        logits = logits_of(row[:-1])
        wanted = np.take_along_axis(log_softmax(logits), row[1:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(each.logprob_T, wanted, **CLOSE)
        best = np.take_along_axis(logits, each.best_T[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(best, logits.max(-1), **CLOSE)


def test_answers_are_scored_where_they_stand():
    predictor = ModelPredictor(configs.built("odd"), batch_size=2, longest=1024)
    row = configs.tokens(1, 9)[0].tolist()
    whole = predictor.score([np.array(row[:-1])], [np.array(row[1:])])[0]
    short, long = score_answers(predictor, [row[:6], row[:5]], [row[6:7], row[5:]])
    assert len(short.logprob_T) == 1 and len(long.logprob_T) == 4
    np.testing.assert_allclose(long.logprob_T, whole.logprob_T[4:], **CLOSE)
    np.testing.assert_allclose(short.logprob_T, whole.logprob_T[5:6], **CLOSE)


def test_generation_in_batches_is_that_of_each_prompt_alone():
    predictor = ModelPredictor(configs.built("odd"), batch_size=2)
    prompts = [configs.tokens(1, length, seed=length)[0] for length in (9, 20, 4)]
    found = predictor.generate(prompts, 5)
    for prompt, new in zip(prompts, found, strict=True):
        alone = inference.generate(configs.built("odd"), prompt[None], max_new_tokens=5)
        np.testing.assert_array_equal(new, np.asarray(alone)[0])


def test_ids_outside_the_vocabulary_and_empty_rows_are_errors():
    predictor = ModelPredictor(configs.built("odd"))
    with pytest.raises(ValueError, match=f"below vocab_size={configs.VOCAB}.*; got 99"):
        predictor.score([np.array([1])], [np.array([99])])
    with pytest.raises(ValueError, match="at least one token; got an empty one"):
        predictor.score([np.array([], np.int32)], [np.array([], np.int32)])
