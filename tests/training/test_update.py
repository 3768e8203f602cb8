"""One update: what decays, what never moves, accumulation, packing, and dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.data import Batch
from hybrid_jax.training.optimizer import Optimizer, is_decayed, is_frozen
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import abstract_state, initial_state
from hybrid_jax.training.step import make_evaluation_step, make_train_step
from sharding import Logical
from tests.training import small


@functools.cache
def parts():
    """Skeleton, optimiser and evaluation step of the small run."""
    config = small.small_run()
    skeleton = Skeleton(config.model)
    return skeleton, Optimizer(config, skeleton.axes), make_evaluation_step(config, skeleton)


@functools.cache
def update(rounds: int):
    """(params, metrics) after the first update, accumulated over `rounds`."""
    # Without the balance loss, which is no sum over tokens.
    config = small.small_run(
        accumulate=rounds,
        loss=t.Loss(balance=None, router_z_loss=1e-3),
        schedule=t.Schedule(peak=1e-2, warmup_steps=0),
    )
    skeleton, _, _ = parts()
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer)
    state, metrics = make_train_step(config, skeleton, optimizer)(state, small.random_batch(4, 32))
    return jax.device_get(state.params), jax.device_get(metrics)


def test_matrices_decay_and_nothing_else_does():
    skeleton, _, _ = parts()
    not_decayed = {name for name, axes in skeleton.axes.items() if not is_decayed(axes)}
    # All norms, the one inside attention [heads, head_dim] too; no bias and no matrix.
    assert not_decayed == {name for name in skeleton.names if "norm" in name}
    assert not any(is_frozen(axes) for axes in skeleton.axes.values())
    # The correction bias of a sigmoid router, and the coefficient of a shared expert.
    assert is_frozen((Logical.EXPERTS,)) and not is_decayed((Logical.EXPERTS,))
    assert not is_decayed((Logical.MODEL,))


def test_decay_shrinks_only_what_it_should_and_frozen_stays():
    config = small.small_run(
        optimizer=t.AdamW(weight_decay=0.5), schedule=t.Schedule(peak=0.1, warmup_steps=0)
    )
    axes = {"matrix": (Logical.MODEL, Logical.FFN), "norm": (Logical.MODEL,)}
    axes |= {"bias": (Logical.EXPERTS,)}
    optimizer = Optimizer(config, axes)
    params = {name: jnp.ones((2, 2)) for name in axes}
    zeros = jax.tree.map(jnp.zeros_like, params)
    # A frozen bias ignores even a gradient.
    gradients = zeros | {"bias": jnp.ones((2, 2))}
    after, _, norm = optimizer.update(params, gradients, optimizer.init(params), 0)
    np.testing.assert_allclose(after["matrix"], 1 - 0.1 * 0.5, rtol=1e-6)
    assert (after["norm"] == 1).all() and (after["bias"] == 1).all()
    np.testing.assert_allclose(norm, 2.0)


def test_the_update_is_adamw_with_clipping():
    config = small.small_run(
        optimizer=t.AdamW(weight_decay=0.0, eps=1e-2, clip_norm=0.5),
        schedule=t.Schedule(peak=0.1, warmup_steps=0),
    )
    optimizer = Optimizer(config, {"w": (Logical.MODEL, Logical.FFN)})
    params, gradients = {"w": jnp.ones((1, 2))}, {"w": jnp.array([[3.0, 4.0]])}
    after, _, norm = optimizer.update(params, gradients, optimizer.init(params), 0)
    clipped = np.array([[0.3, 0.4]])
    # The first step of Adam: moment over its root, both corrected for bias.
    np.testing.assert_allclose(after["w"], 1 - 0.1 * clipped / (clipped + 1e-2), rtol=1e-5)
    np.testing.assert_allclose(norm, 5.0, rtol=1e-6)


def test_moments_of_half_the_bytes_give_nearly_the_same_updates():
    params = {"w": jnp.ones((4, 64))}

    def trained(moments):
        config = small.small_run(
            optimizer=t.AdamW(moments=moments, eps=1e-6), schedule=t.Schedule(peak=0.1)
        )
        optimizer = Optimizer(config, {"w": (Logical.MODEL, Logical.FFN)})
        state, after = optimizer.init(params), params
        for step in range(4):
            gradients = {"w": jax.random.normal(jax.random.key(step), (4, 64))}
            after, state, _ = optimizer.update(after, gradients, state, step)
        kept = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
        return after["w"] - 1, kept

    moved, kept = trained("bfloat16")
    expected, _ = trained("float32")
    assert kept == {jnp.dtype("bfloat16")}
    # Eight bits of a number are kept, four times rounded: one per cent of the way.
    assert np.abs(moved - expected).max() < 0.01 * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"moments must be one of .*; got 'float16'"):
        t.AdamW(moments="float16")


def test_bfloat16_parameters_keep_their_dtype_and_float32_moments():
    dtypes = dataclasses.replace(small.small_model().dtypes, parameters="bfloat16")
    config = small.small_run(model=small.small_model(dtypes=dtypes))
    skeleton = Skeleton(config.model)
    state = abstract_state(skeleton, Optimizer(config, skeleton.axes))
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    step = make_train_step(config, skeleton, Optimizer(config, skeleton.axes))
    after, _ = jax.eval_shape(step, state, small.random_batch(4, 32))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_accumulation_equals_the_whole_batch():
    # The rows differ in their number of tokens.
    whole, metrics = update(1)
    split, split_metrics = update(4)
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(split_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-4)
    assert split_metrics["tokens"] == metrics["tokens"] == 4 * 32 - 5
    for name, array in whole.items():
        # Adam's first step has size 1e-2 whatever the gradient, so where a gradient is no more than
        # rounding a few elements may differ by that much.
        assert np.mean(np.abs(array - split[name]) > 1e-5) < 1e-3, name


def test_fewer_rows_than_a_round_are_one_round():
    config = small.small_run(batch_size=8, accumulate=1)
    skeleton, optimizer, _ = parts()
    step = make_train_step(config, skeleton, optimizer)
    state = abstract_state(skeleton, optimizer)
    _, metrics = jax.eval_shape(step, state, small.random_batch(4, 32))
    assert metrics["tokens"].shape == ()


def test_a_packed_row_has_the_loss_of_its_documents():
    skeleton, optimizer, evaluate = parts()
    params = initial_state(small.small_run(), skeleton, optimizer).params
    packed = small.random_batch(1, 32)
    cut = 32 // 3
    total, weight = evaluate(params, packed)
    separate = 0.0
    for part in (slice(0, cut), slice(cut, 27)):
        piece = [column[:, part] for column in packed[:5]]
        piece = [np.pad(column, ((0, 0), (0, 32 - column.shape[1]))) for column in piece]
        piece[2] = (piece[2] > 0).astype(np.int32)
        separate += evaluate(params, Batch(*piece))[0]
    assert weight == 27
    # The same float32 sums in another order.
    np.testing.assert_allclose(total, separate, rtol=1e-5)


def test_an_update_lowers_the_loss_and_reports_itself():
    after, metrics = update(1)
    _, _, evaluate = parts()
    nll, weight = evaluate(after, small.random_batch(4, 32))
    assert float(nll / weight) < float(metrics["loss"])
    names = "loss loss_by_position tokens balance_loss router_z"
    loads = "expert_load_max expert_load_min expert_load_entropy"
    norms = "gradient_norm update_norm parameter_norm"
    others = {"learning_rate", "skipped"}
    assert set(metrics) == {*names.split(), *loads.split(), *norms.split()} | others
    skeleton, optimizer, _ = parts()
    before = jax.device_get(initial_state(small.small_run(), skeleton, optimizer).params)
    moved = [np.square(np.float64(after[name]) - before[name]).sum() for name in before]
    np.testing.assert_allclose(metrics["update_norm"], np.sqrt(sum(moved)), rtol=1e-4)
    squares = sum(np.square(np.float64(array)).sum() for array in after.values())
    np.testing.assert_allclose(metrics["parameter_norm"], np.sqrt(squares), rtol=1e-5)
    assert metrics["expert_load_max"] >= 1 >= metrics["expert_load_min"] >= 0
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2, rtol=1e-6)
