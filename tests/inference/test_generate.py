"""Inference: cached equals whole, chunks equal the whole, sampling keeps what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import inference
from hybrid_jax.inference import sampling
from tests.model import configs

# float32 with sums in another order, relative to logits of about 5.
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.mark.parametrize("name", configs.FAMILY)
def test_ragged_prefill_in_chunks_then_decode_equals_the_whole(name):
    model, tokens = configs.built(name), configs.tokens(2, 24)
    lengths = np.array([20, 7])
    logits, state = inference.prefill(
        model, tokens[:, :20], lengths, model.initial_state(2, 32), chunk=8
    )
    whole = configs.forward(name)(tokens)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row], whole[row, length - 1], **CLOSE)
    np.testing.assert_array_equal(state.lengths_B, lengths)
    step = jax.jit(lambda token, state: inference.decode_step(model, token, state))
    for ahead in range(3):
        token = tokens[[0, 1], lengths + ahead]
        logits, state = step(jnp.asarray(token), state)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], whole[row, length + ahead], **CLOSE)


def _greedy_by_whole_forward(name, prompt, count):
    row = np.zeros((1, 24), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        row[0, at] = configs.forward(name)(row)[0, at - 1].argmax()
    return row[0, len(prompt) : len(prompt) + count]


def test_generation_is_greedy_per_row_and_fills_after_the_end():
    model, tokens = configs.built("text_01"), configs.tokens(2, 9)
    lengths = [9, 4]
    out = np.asarray(inference.generate(model, tokens, max_new_tokens=6, prompt_lengths=lengths))
    for row, length in enumerate(lengths):
        expected = _greedy_by_whole_forward("text_01", tokens[row, :length], 6)
        np.testing.assert_array_equal(out[row], expected)
    end = int(out[0, 2])
    stopped = np.asarray(
        inference.generate(model, tokens, max_new_tokens=6, prompt_lengths=lengths, eos_id=end)
    )
    for row in range(2):
        first = next((i for i, token in enumerate(out[row]) if token == end), 6)
        np.testing.assert_array_equal(stopped[row, : first + 1], out[row, : first + 1])
        assert (stopped[row, first:] == end).all()


def test_sampling_depends_on_the_seed_only():
    model, tokens = configs.built("text_01"), configs.tokens(2, 9)
    draw = lambda seed: np.asarray(
        inference.generate(model, tokens, max_new_tokens=6, temperature=1.0, seed=seed)
    )
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"),
    [
        (None, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {1, 3}),
        (None, 0.6, {1, 3}),
        (None, 0.4, {3}),
        (1, 1.0, {3}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely(top_k, top_p, allowed):
    logits = jnp.log(jnp.array([[0.1, 0.3, 0.1, 0.5]]))
    spec = sampling.Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = sampling.sample(jnp.tile(logits, (200, 1)), spec, keys)
    assert set(np.asarray(drawn).tolist()) == allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_BT": np.zeros((1, 0), np.int32)}, "at least one row and one token"),
        ({"tokens_BT": np.full((1, 3), configs.VOCAB)}, "below vocab_size=48.*got 48"),
        ({"tokens_BT": np.full((1, 3), -1)}, "not negative; got -1"),
        ({"prompt_lengths": [0]}, r"between 1 and 3; got \[0\]"),
        ({"prompt_lengths": [4]}, r"between 1 and 3; got \[4\]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"eos_id": 99}, r"eos_id must be in \[0, 48\)"),
        ({"seed": 1 << 32}, r"seed must be in \[0, 2\*\*32\); got 4294967296"),
    ],
)
def test_bad_requests_are_refused(change, message):
    request = {"tokens_BT": np.zeros((1, 3), np.int32), "max_new_tokens": 2} | change
    tokens = request.pop("tokens_BT")
    with pytest.raises(ValueError, match=message):
        inference.generate(configs.built("m2"), tokens, **request)


def test_no_new_tokens_is_an_empty_result():
    out = inference.generate(configs.built("m2"), np.zeros((2, 3), np.int32), max_new_tokens=0)
    assert out.shape == (2, 0)
