"""Recall and needles: an ideal memory scores everything, a guess scores chance, pieces add up."""

import functools

import numpy as np
import pytest

from hybrid_jax.config.evaluation import MultiNeedle, Needle, Recall, TokenNeedle
from hybrid_jax.data import train_tokenizer
from hybrid_jax.evaluation import haystack, needle, recall, token_needle
from tests.evaluation import handmade


@functools.cache
def tokenizer():
    words = " ".join(f"The special magic {city} number is: 12." for city in haystack.CITIES)
    return train_tokenizer([haystack.FILLER + words + "\nWhat is the numbers are?"], 400).backend


def memory(vocab_size=64):
    return handmade.HandMade(vocab_size, handmade.first_successor)


def test_an_ideal_memory_answers_every_question():
    report = recall.evaluate(memory(), Recall(pairs=(4, 12), length=64, rows=3), seed=0)
    assert [each["pairs"] for each in report["pairs"]] == [4, 12]
    for each in report["pairs"]:
        assert each["recall"] == 1.0
        assert each["logprob"] == pytest.approx(np.log(handmade.CERTAINTY))
        assert each["questions"] == 3 * (64 - 2 * each["pairs"])
        assert sum(d["questions"] for d in each["distances"]) == each["questions"]
        assert all(d["recall"] == 1.0 for d in each["distances"])


def test_one_of_the_rows_values_at_random_scores_chance():
    rng = np.random.default_rng(0)

    def guess(tokens_T):
        return rng.choice(tokens_T[tokens_T >= 32], len(tokens_T))

    predictor = handmade.HandMade(64, guess)
    report = recall.evaluate(predictor, Recall(pairs=(4, 16), length=128, rows=40), seed=0)
    for each in report["pairs"]:
        # Four standard deviations of the mean of so many independent guesses.
        noise = 4 * np.sqrt(each["chance"] * (1 - each["chance"]) / each["questions"])
        assert each["recall"] == pytest.approx(each["chance"], abs=noise)


def test_a_memory_that_fades_shows_by_distance():
    def best(tokens_T):
        out = handmade.first_successor(tokens_T)
        place = np.arange(len(tokens_T))
        first = np.array([np.flatnonzero(tokens_T == token)[0] for token in tokens_T])
        return np.where(place - (first + 1) <= 32, out, 0)

    settings = Recall(pairs=(4,), length=64, rows=4)
    (each,) = recall.evaluate(handmade.HandMade(64, best), settings, seed=0)["pairs"]
    found = {d["last"]: d["recall"] for d in each["distances"]}
    assert found == {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 0.0}


def test_token_needles_are_found_by_a_memory_and_not_by_a_guess():
    settings = TokenNeedle(lengths=(24, 48), depths=(0.0, 0.4, 1.0), samples=5, value_length=2)
    report = token_needle.evaluate(memory(), settings, seed=0)
    assert [(c["length"], c["depth"]) for c in report["cells"]] == [
        (length, depth) for length in (24, 48) for depth in (0.0, 0.4, 1.0)
    ]
    assert all(cell["exact"] == cell["tokens"] == 1.0 for cell in report["cells"])
    # Knows the first token of the value only.
    half = handmade.HandMade(64, lambda t: np.where(t < 32, handmade.first_successor(t), 0))
    report = token_needle.evaluate(half, settings, seed=0)
    assert all((cell["exact"], cell["tokens"]) == (0.0, 0.5) for cell in report["cells"])


def test_a_vocabulary_larger_than_the_models_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=65 asks for ids that the model lacks: .* 64"):
        recall.evaluate(memory(), Recall(vocab_size=65), seed=0)


def test_a_reader_finds_every_needle_in_text():
    predictor = handmade.HandMade(400, handmade.reader(tokenizer()))
    settings = Needle(lengths=(150, 220), depths=(0.0, 0.5, 1.0), samples=2)
    report = needle.evaluate(predictor, tokenizer(), settings, seed=3)
    assert len(report["cells"]) == 6
    assert all(c["exact"] == c["forced"] == c["tokens"] == 1.0 for c in report["cells"])
    many = MultiNeedle(lengths=(300,), counts=(2, 3), samples=2)
    report = needle.evaluate_many(predictor, tokenizer(), many, seed=3)
    assert [(c["count"], c["exact"], c["forced"]) for c in report["cells"]] == [
        (2, 1.0, 1.0),
        (3, 1.0, 1.0),
    ]


def test_a_model_that_says_nothing_finds_no_needle():
    predictor = handmade.HandMade(400, lambda tokens_T: np.zeros_like(tokens_T))
    settings = Needle(lengths=(150,), depths=(0.5,), samples=2)
    (cell,) = needle.evaluate(predictor, tokenizer(), settings, seed=3)["cells"]
    assert (cell["exact"], cell["forced"], cell["samples"]) == (0.0, 0.0, 2)


def test_numbers_count_in_any_order_and_only_as_many_as_were_asked_for():
    assert needle._share_said(" 12, 34 and 56", ("34", "12", "78")) == pytest.approx(2 / 3)
    assert needle._share_said(" 12 and 34 56 78", ("78", "12")) == 0.5
    assert needle._share_said(" 123", ("12",)) == 0.0
    assert needle._share_said("", ("12",)) == 0.0


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_has_its_length_and_hides_the_needle_between_sentences(depth):
    hay = haystack.Haystack(tokenizer(), None, 200)
    prompt = hay.prompt(np.random.default_rng(1), 200, (depth,), 7)
    assert len(prompt.ids) == 200
    text = tokenizer().decode(prompt.ids)
    (number,) = prompt.numbers
    assert len(number) == 7 and tokenizer().decode(prompt.answer) == f" {number}"
    before, after = text.split(f"number is: {number}.")
    before = before.rpartition(" The special magic")[0]
    assert text.endswith("number is:")
    assert depth in (0.0, 1.0) or before.rstrip()[-1] in ".!?"
    share = len(before) / len(before + after.rpartition("\nWhat")[0])
    # A sentence of filler is about a tenth of it.
    assert share == pytest.approx(depth, abs=0.12)


def test_too_little_text_and_too_short_prompts_are_errors(tmp_path):
    (tmp_path / "a.txt").write_text("Few words.")
    with pytest.raises(ValueError, match=r"holds \d+ tokens; a length of 200 was asked for"):
        haystack.Haystack(tokenizer(), str(tmp_path / "a.txt"), 200)
    hay = haystack.Haystack(tokenizer(), None, 20)
    with pytest.raises(ValueError, match="20 tokens has no room for 1 needles"):
        hay.prompt(np.random.default_rng(1), 20, (0.5,), 7)
