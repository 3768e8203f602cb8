"""The formulas inside: decay, rotary positions, positions in segments, routing, expert mixture."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import layers
from hybrid_jax.model import context, decay, rotary
from hybrid_jax.model.ffn import moe, router
from hybrid_jax.model.ffn import table as ffn_table
from hybrid_jax.model.mixers import table as mixer_table


def test_every_layer_kind_has_its_module():
    assert set(mixer_table.MIXERS) == set(typing.get_args(layers.Mixer))
    assert set(ffn_table.FFNS) == set(typing.get_args(layers.Ffn))


def test_slopes_of_the_released_model():
    # Heads 0, 1, 31, 63 of 64, and the factor of layers 0, 40, 78 of 80, worked out by hand.
    slopes = decay.head_slopes(64)
    np.testing.assert_allclose(
        slopes[[0, 1, 31, 63]], [0.917004, 0.840896, 0.0625, 0.00390625], rtol=1e-6
    )
    factors = [decay.log_decay(64, layer, 80)[31] / -0.0625 for layer in (0, 40, 78)]
    np.testing.assert_allclose(factors, [1.00001, 0.493681, 0.0126682], rtol=1e-5)
    assert decay.log_decay(64, 79, 80).max() < 0
    assert np.isfinite(decay.log_decay(64, 0, 1)).all()


def test_slopes_of_twelve_heads_follow_the_alibi_rule():
    eight = 2.0 ** -np.arange(1, 9)
    sixteen = 2.0 ** (-np.arange(1, 17) / 2)
    np.testing.assert_allclose(decay.head_slopes(12), [*eight, *sixteen[[0, 2, 4, 6]]], rtol=1e-12)


def test_rotary_turns_half_split_pairs_as_complex_numbers():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 10)).astype(np.float32)
    positions = np.array([[0, 1, 2, 7, 100]])
    pair = x[..., :3] + 1j * x[..., 3:6]
    turned = pair * np.exp(1j * positions[..., None, None] * 100.0 ** (-2 * np.arange(3) / 6))
    got = rotary.rotate(jnp.asarray(x), jnp.asarray(positions), rotary_dim=6, theta=100.0)
    # sin and cos of angles up to 100 in float32.
    np.testing.assert_allclose(got[..., :3], turned.real, atol=2e-5)
    np.testing.assert_allclose(got[..., 3:6], turned.imag, atol=2e-5)
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])


def test_positions_count_the_real_tokens_of_each_segment():
    ids = jnp.array([[3, 3, 1, 1, 1, 0, 0], [0, 2, 2, 0, 2, 5, 5], [0, 0, 0, 0, 0, 0, 0]])
    got = np.asarray(context.segment_positions(ids))
    real = np.asarray(ids) != 0
    np.testing.assert_array_equal(got[0][real[0]], [0, 1, 0, 1, 2])
    # Equal ids across padding continue.
    np.testing.assert_array_equal(got[1][real[1]], [0, 1, 2, 0, 1])
    assert (got >= 0).all()


def test_softmax_router_renormalises_the_softmax_over_all_experts():
    logits = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    choice = router.choose_softmax(jnp.asarray(logits), layers.SoftmaxTopK(experts_per_token=2))
    full = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-full, axis=-1)[:, :2]
    np.testing.assert_array_equal(choice.expert_TA, best)
    kept = np.take_along_axis(full, best, -1)
    np.testing.assert_allclose(choice.weight_TA, kept / kept.sum(-1, keepdims=True), rtol=1e-5)


def test_sigmoid_router_selects_with_the_bias_and_weighs_without_it():
    logits = jnp.array([[2.0, 1.0, 0.0, -3.0]])
    bias = jnp.array([0.0, 0.0, 0.0, 10.0])
    choice = router.choose_sigmoid(logits, bias, layers.SigmoidTopK(experts_per_token=2))
    assert sorted(np.asarray(choice.expert_TA)[0]) == [0, 3]
    score = 1 / (1 + np.exp(-np.array([-3.0, 2.0])))
    expected = dict(zip((3, 0), score / score.sum(), strict=True))
    got = dict(zip(*(np.asarray(leaf)[0].tolist() for leaf in choice), strict=True))
    assert got == pytest.approx(expected, rel=1e-5)


def test_expert_mixture_equals_the_dense_oracle_with_all_gradients():
    generator = np.random.default_rng(2)
    T, D, E, F, A = 13, 6, 5, 4, 2
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
    x, gate_up, down = draw(T, D), draw(E, D, 2, F), draw(E, F, D)
    # Expert 3 gets nothing; the rest is uneven.
    expert = jnp.asarray(generator.choice([0, 1, 2, 4], (T, A), p=[0.6, 0.2, 0.1, 0.1]))
    weight = jax.nn.softmax(draw(T, A))

    def ours(x, gate_up, down, weight):
        choice = router.Choice(expert, weight)
        return moe.expert_mixture(x, choice, gate_up, down, E, None)

    def oracle(x, gate_up, down, weight):
        hidden = jnp.einsum("td,edcf->tecf", x, gate_up)
        out = jnp.einsum("tef,efd->ted", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], down)
        mix = jnp.einsum("tae,ta->te", jax.nn.one_hot(expert, E), weight)
        return jnp.einsum("ted,te->td", out, mix)

    arguments = (x, gate_up, down, weight)
    cotangent = draw(T, D)
    value, pull = jax.vjp(jax.jit(ours), *arguments)
    expected, pull_oracle = jax.vjp(jax.jit(oracle), *arguments)
    # float32, sums of at most 13 x 5 terms of size about 10.
    np.testing.assert_allclose(value, expected, atol=1e-4)
    for got, want in zip(pull(cotangent), pull_oracle(cotangent), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_routing_statistics_leave_padding_out():
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((4, 3)), jnp.float32)
    expert = jnp.array([[0, 1], [2, 1], [0, 2], [1, 0]])
    real = jnp.array([1.0, 1.0, 0.0, 0.0])
    got = router.statistics(logits, expert, real)
    np.testing.assert_array_equal(got.hits_E, [1, 2, 1])
    assert got.tokens == 2
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got.probability_E, softmax[:2].sum(0), rtol=1e-5)
    normaliser = np.log(np.exp(np.asarray(logits)[:2]).sum(-1))
    np.testing.assert_allclose(got.logsumexp_squared, (normaliser**2).sum(), rtol=1e-5)
