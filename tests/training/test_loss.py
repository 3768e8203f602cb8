"""The chunked loss equals the whole one with all gradients; the router's losses their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.model.ffn.router import Routing
from hybrid_jax.training import balance
from hybrid_jax.training.loss import cross_entropy

B, T, D, W = 2, 11, 8, 37


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D))
    kernel_DW = jax.random.normal(keys[1], (D, W))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, W)
    weights_BT = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    return x_BTD, kernel_DW, targets_BT, weights_BT.at[0, 0].set(0.5)


def whole(x_BTD, kernel_DW, targets_BT, weights_BT, z_loss):
    """All logits at once, straight from the definition."""
    logits_BTW = jnp.einsum("btd,dw->btw", x_BTD, kernel_DW)
    normaliser_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTW, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (normaliser_BT - picked_BT + z_loss * normaliser_BT**2))


# 8: chunks of 4 tokens in time, the last one padded; 1000: no chunks.
@pytest.mark.parametrize(("chunk_tokens", "z_loss"), [(8, 0.1), (1000, 0.0)])
def test_chunks_change_neither_loss_nor_gradients(inputs, chunk_tokens, z_loss):
    x, kernel, targets, weights = inputs

    def ours(x, kernel):
        sums = cross_entropy(x, kernel, targets, weights, z_loss=z_loss, chunk_tokens=chunk_tokens)
        return 0.7 * sums.total, sums.nll_BT

    (value, nll_BT), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(x, kernel)
    definition = lambda x, kernel: 0.7 * whole(x, kernel, targets, weights, z_loss)
    wanted, wanted_gradients = jax.value_and_grad(definition, (0, 1))(x, kernel)
    # float32 sums of a few hundred terms in another order.
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    probability_BTW = np.array(jax.nn.log_softmax(jnp.einsum("btd,dw->btw", x, kernel)))
    each_BT = -np.take_along_axis(probability_BTW, np.array(targets)[..., None], axis=2)[..., 0]
    # Every token has its own, those of weight 0 too.
    np.testing.assert_allclose(nll_BT, each_BT, rtol=1e-5)
    for ours_, theirs in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-4, atol=1e-5)
    plain = cross_entropy(x, kernel, targets, weights, z_loss=z_loss, chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(plain.nll_BT, nll_BT, rtol=1e-6)


def test_all_logits_never_exist_at_one_time():
    def loss(x_BTD, kernel_DW):
        targets, weights = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64))
        return cross_entropy(x_BTD, kernel_DW, targets, weights, chunk_tokens=32).total

    arguments = jnp.ones((4, 64, 4)), jnp.ones((4, 1000))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).as_text()
    assert "4x8x1000" in text  # a chunk of logits
    assert "4x64x1000" not in text and "256x1000" not in text


def test_half_precision_gradients_keep_their_dtypes(inputs):
    x, kernel, targets, weights = inputs
    loss = lambda x, kernel: cross_entropy(x, kernel, targets, weights).total
    gradients = jax.grad(loss, (0, 1))(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]


@pytest.fixture(scope="module")
def routing():
    """Three layers, four experts, top 2, ten tokens; loads far from even."""
    probability_LTE = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (3, 10, 4)))
    _, chosen_LTA = jax.lax.top_k(probability_LTE, 2)
    hits_LE = jnp.sum(jax.nn.one_hot(chosen_LTA, 4), axis=(1, 2))
    totals = jnp.full((3,), 10.0)
    return probability_LTE, Routing(hits_LE, jnp.sum(probability_LTE, axis=1), 2.0 * totals, totals)


def test_the_balance_losses_follow_their_formulas(routing):
    probability_LTE, stats = routing
    p, hits = np.array(probability_LTE, np.float64), np.array(stats.hits_E, np.float64)
    by_layer = [(hits[i] / 20 * p[i].mean(0)).sum() / 4 for i in range(3)]
    np.testing.assert_allclose(balance.report_balance_loss(stats), sum(by_layer), rtol=1e-5)
    f_E, P_E = hits.sum(0) / 30, p.reshape(30, 4).mean(0)
    theirs = 4 * (f_E * P_E).sum()
    np.testing.assert_allclose(balance.hugging_face_balance_loss(stats), theirs, rtol=1e-5)
    np.testing.assert_allclose(balance.router_z_loss(stats), 6.0, rtol=1e-6)
    weighed = balance.balance_loss(t.HuggingFaceBalance(coefficient=0.5), stats)
    np.testing.assert_allclose(weighed, 0.5 * theirs, rtol=1e-5)
    assert balance.balance_loss(None, stats) == 0
    assert balance.balance_loss(t.ReportBalance(), None) == 0


def test_the_hugging_face_loss_equals_transformers(routing):
    torch = pytest.importorskip("torch")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    probability_LTE, stats = routing
    logits = tuple(torch.tensor(np.log(np.array(layer))) for layer in probability_LTE)
    theirs = minimax.load_balancing_loss_func(logits, 4, 2)
    ours = balance.hugging_face_balance_loss(stats)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
