"""Perplexity by length: the run's own loss where lengths agree; the right tokens in each bucket."""

import numpy as np
import pytest

from hybrid_jax import model as models
from hybrid_jax.config.evaluation import Perplexity
from hybrid_jax.data import Part, TokenStore
from hybrid_jax.evaluation import ModelPredictor, perplexity
from hybrid_jax.training.evaluate import Heldout
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.step import make_evaluation_step
from tests.evaluation import handmade
from tests.training import small


def store(*lengths: int, vocab_size=small.VOCAB) -> TokenStore:
    ids = np.random.default_rng(0).integers(0, vocab_size, sum(lengths)).astype(np.uint16)
    return TokenStore.of(ids, np.cumsum([0, *lengths]))


def test_at_the_runs_length_it_is_the_runs_held_out_loss():
    # Weights so large that context matters to a model that has learned nothing.
    config = small.small_run(model=small.small_model(initializer_range=0.3))
    texts, skeleton = store(70, 1, 9, 130, 33), Skeleton(config.model)
    model = models.build(config.model, seed=1)
    heldout = Heldout(config, (Part(config.data.sources[0], texts, texts),), None)
    losses = heldout.losses(make_evaluation_step(config, skeleton), skeleton.named(model))
    wanted = losses["heldout_loss"]
    report = perplexity.evaluate(ModelPredictor(model), texts, Perplexity(lengths=(32, 64)))
    (at_32, at_64) = report["lengths"]
    # Two float32 sums over the same tokens, in another order.
    assert at_32["nats"] == pytest.approx(wanted, rel=1e-5)
    assert at_32["tokens"] == at_64["tokens"] == 69 + 8 + 129 + 32
    assert at_64["nats"] != pytest.approx(wanted, rel=1e-2)
    assert sum(each["tokens"] for each in report["positions"]) == at_64["tokens"]
    mean = sum(each["nats"] * each["tokens"] for each in report["positions"]) / at_64["tokens"]
    assert mean == pytest.approx(at_64["nats"])


def test_positions_count_what_the_predicted_token_sees():
    # Right only where it has seen four tokens or fewer, all alike: one document of equal tokens.
    ids = np.full(17, 5, np.uint16)
    one = TokenStore.of(ids, np.array([0, 17]))

    def best(tokens_T):
        return np.where(np.arange(len(tokens_T)) < 4, 5, 0)

    report = perplexity.evaluate(handmade.HandMade(10, best), one, Perplexity(lengths=(8, 16)))
    right, wrong = -np.log(handmade.CERTAINTY), -np.log((1 - handmade.CERTAINTY) / 9)
    found = {(e["first"], e["last"]): (e["nats"], e["tokens"]) for e in report["positions"]}
    assert found == {
        (1, 1): (pytest.approx(right), 1),
        (2, 2): (pytest.approx(right), 1),
        (3, 4): (pytest.approx(right), 2),
        (5, 8): (pytest.approx(wrong), 4),
        (9, 16): (pytest.approx(wrong), 8),
    }
    # Windows of 8 begin anew: half of each is right.
    assert report["lengths"][0]["nats"] == pytest.approx((right + wrong) / 2)
    assert report["lengths"][0]["perplexity"] == pytest.approx(np.exp((right + wrong) / 2))


def test_text_is_cut_to_the_tokens_asked_for():
    texts = store(10, 20, 30)
    cut = texts.first(15)
    assert cut.lengths.tolist() == [10, 7]
    np.testing.assert_array_equal(cut.read(1, 0, 7)[0], texts.read(1, 0, 7)[0])
    assert texts.first(9 + 19).lengths.tolist() == [10, 20]
    assert texts.first(1000) is texts


def test_text_without_so_long_a_document_is_an_error():
    predictor = handmade.HandMade(small.VOCAB, lambda tokens_T: tokens_T)
    with pytest.raises(ValueError, match="context of 64 tokens: the longest has 40 tokens"):
        perplexity.evaluate(predictor, store(10, 40), Perplexity(lengths=(16, 64)))
