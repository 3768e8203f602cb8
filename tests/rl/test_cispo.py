"""CISPO's loss and gradient are the report's, chunk by chunk and wherever they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.rl import Cispo, PolicyBatch
from hybrid_jax.training.loss import cross_entropy
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from tests.training import small

B, T, D, W = 2, 11, 8, 37


@pytest.fixture(scope="module")
def inputs():
    """Ratios from far below to far above the bounds, advantages of either sign."""
    keys = jax.random.split(jax.random.key(0), 6)
    x_BTD, kernel_DW = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, W))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, W)
    weights_BT = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    advantages_BT = jax.random.normal(keys[4], (B, T))
    logprobs_BT = jnp.take_along_axis(
        jax.nn.log_softmax(x_BTD @ kernel_DW), targets_BT[..., None], axis=-1
    )[..., 0]
    old_logprobs_BT = logprobs_BT + 1.5 * jax.random.normal(keys[5], (B, T))
    return x_BTD, kernel_DW, targets_BT, weights_BT, advantages_BT, old_logprobs_BT


def definition(x, kernel, targets, weights, advantages, old, low, high):
    """Equation 4 of the report, and clipped as in equation 5."""
    logprobs = jax.nn.log_softmax(jnp.einsum("btd,dw->btw", x, kernel))
    logprobs = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    ratio = jax.lax.stop_gradient(jnp.clip(jnp.exp(logprobs - old), low, high))
    return -jnp.sum(weights * ratio * advantages * logprobs)


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.5, 1.5)])
def test_loss_and_gradients_follow_the_definition(inputs, low, high):
    x, kernel, *tokens = inputs

    def ours(x, kernel):
        objective = Cispo(is_weight_min=low, is_weight_max=high)
        return cross_entropy(x, kernel, *tokens, reweigh=objective, chunk_tokens=8).total

    found, gradients = jax.value_and_grad(ours, (0, 1))(x, kernel)
    theirs = lambda x, kernel: definition(x, kernel, *tokens, low, high)
    expected, expected_gradients = jax.value_and_grad(theirs, (0, 1))(x, kernel)
    # float32 sums of a few hundred terms in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-5)


def test_a_clipped_token_keeps_its_gradient(inputs):
    x, kernel, targets, weights, advantages, _ = inputs
    # As if every token had been all but impossible when it was sampled.
    old = jnp.full((B, T), -50.0)
    objective = Cispo(is_weight_max=3.0)
    more = advantages, old
    gradient = jax.grad(
        lambda x: cross_entropy(x, kernel, targets, weights, *more, reweigh=objective).total
    )(x)
    at_the_bound = jax.grad(
        lambda x: cross_entropy(x, kernel, targets, 3.0 * weights * advantages).total
    )(x)
    np.testing.assert_allclose(gradient, at_the_bound, rtol=1e-5, atol=1e-6)
    assert (jnp.abs(gradient).max(axis=-1) > 0)[weights > 0].all()


def _update(mesh: str | None):
    placement = mesh and placements.make(mesh, "expert", jax.devices()[:4])
    config = small.small_run(batch_size=4)
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer, placement or None)
    batch = small.random_batch(4, 32)
    rng = np.random.default_rng(0)
    advantages, old = (rng.normal(size=(4, 32)).astype(np.float32) for _ in range(2))
    batch = PolicyBatch(*batch, advantages, old - 5.0)
    if placement:
        batch = jax.device_put(batch, placement.sharding(*placements.ROWS))
    step = make_train_step(config, skeleton, optimizer, placement or None, Cispo())
    state, metrics = jax.device_get(step(state, batch))
    # After one update the first moment is the gradient, but for a factor.
    return jax.tree.leaves(state.optimizer), metrics


def test_an_update_is_the_same_on_a_mesh():
    found, metrics = _update("fsdp=2,expert=2")
    expected, expected_metrics = _update(None)
    for name in ("loss", "gradient_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    # float32 sums in another order, relative to the largest of an array.
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-12)


def test_bounds_that_cross_are_an_error():
    with pytest.raises(ValueError, match=r"0 <= is_weight_min <= is_weight_max.*got 2.0 and 1.0"):
        Cispo(is_weight_min=2.0, is_weight_max=1.0)
