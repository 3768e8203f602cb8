"""Muon's update is Newton-Schulz of each matrix by itself; everything else goes as with AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from sharding import Logical
from tests.training import small

L = Logical
AXES = {
    "qkv": (L.MODEL, L.HEADS, L.PARTS, L.HEAD_DIM),
    "down": (L.EXPERTS, L.FFN, L.MODEL),
    "router": (L.MODEL, L.EXPERTS),
    "head": (L.MODEL, L.VOCAB),
    "norm": (L.MODEL,),
}
# Two stacked layers lead.
SHAPES = {
    "qkv": (2, 8, 2, 3, 6),
    "down": (2, 4, 6, 8),
    "router": (2, 8, 4),
    "head": (8, 16),
    "norm": (2, 8),
}
RATE = 0.1


def optimizer(**options):
    config = small.small_run(
        optimizer=t.Muon(**{"clip_norm": None, "weight_decay": 0.0} | options),
        schedule=t.Schedule(peak=RATE, warmup_steps=0, decay=t.Constant()),
    )
    return Optimizer(config, AXES)


def draw(seed: int):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, SHAPES[name]) for name, key in zip(SHAPES, keys)}


def newton_schulz(matrix: np.ndarray, iterations: int = 5) -> np.ndarray:
    """As on the page of Jordan et al., in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.astype(np.float64)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


def test_each_matrix_moves_by_its_own_newton_schulz_and_as_far_as_with_adam():
    ours, params = optimizer(nesterov=False), jax.tree.map(jnp.zeros_like, draw(0))
    gradients = draw(1)
    after, _, _ = jax.jit(ours.update)(params, gradients, ours.init(params), 0)
    # The momentum of a first gradient, corrected for its beginning, is the gradient.
    value, down = np.asarray(gradients["qkv"]), np.asarray(gradients["down"])
    for layer in range(2):
        for part in range(3):
            matrix = value[layer, :, :, part].reshape(8, 12)
            expected = -RATE * 0.2 * np.sqrt(12) * newton_schulz(matrix)
            found = np.asarray(after["qkv"])[layer, :, :, part].reshape(8, 12)
            # Five float32 iterations; a polynomial this steep loses three or four digits.
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        for expert in range(4):
            expected = -RATE * 0.2 * np.sqrt(8) * newton_schulz(down[layer, expert])
            found = np.asarray(after["down"])[layer, expert]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    # Adam's first step: the sign of the gradient.
    for name in ("router", "head", "norm"):
        np.testing.assert_allclose(after[name], -RATE * np.sign(gradients[name]), rtol=1e-4)


def test_matrices_have_one_moment_and_decay_reaches_what_it_does_with_adamw():
    ours, params = optimizer(weight_decay=0.5), draw(0)
    state = ours.init(params)
    names = [
        path[-1].key
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(path[-1], jax.tree_util.DictKey)
    ]
    assert sorted(names) == sorted([*AXES, "head", "norm", "router"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = ours.update(params, zeros, state, 0)
    for name, array in params.items():
        factor = 1.0 if name == "norm" else 1 - RATE * 0.5
        np.testing.assert_allclose(after[name], factor * array, rtol=1e-6, err_msg=name)


def test_half_the_bytes_for_moments_leave_the_iteration_its_numbers():
    ours, params = optimizer(moments="bfloat16"), draw(0)
    _, state, _ = ours.update(params, draw(1), ours.init(params), 0)
    by_parameter = {
        leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(path[-1], jax.tree_util.DictKey)
    }
    assert by_parameter == {jnp.dtype("bfloat16")}
    coefficients = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
    np.testing.assert_array_equal(coefficients, np.float32([[3.4445, -4.7750, 2.0315]]))
    with pytest.raises(ValueError, match=r"Muon.moments must be one of"):
        t.Muon(moments="float16")


def test_updates_are_the_same_on_a_mesh():
    ours, params, gradients = optimizer(), draw(0), draw(1)
    alone, _, _ = jax.jit(ours.update)(params, gradients, ours.init(params), 0)
    placement = placements.make("fsdp=2,expert=2,tensor=2", "expert")
    where = {
        name: placement.parameter(
            name, (L.LAYERS,) * (len(SHAPES[name]) - len(axes)) + axes, SHAPES[name]
        )
        for name, axes in AXES.items()
    }
    placed = jax.device_put(params, where), jax.device_put(gradients, where)
    split, _, _ = jax.jit(ours.update)(*placed, ours.init(placed[0]), 0)
    for name, array in alone.items():
        # float32 sums in another order, through five steep iterations.
        np.testing.assert_allclose(split[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_model_knows_which_of_its_parameters_are_matrices():
    config = small.small_run(optimizer=t.Muon())
    skeleton = Skeleton(config.model)
    state = jax.eval_shape(Optimizer(config, skeleton.axes).init, skeleton.abstract)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    names = [path[-1].key for path in paths if isinstance(path[-1], jax.tree_util.DictKey)]
    once = {name for name in names if names.count(name) == 1}
    assert once == {
        name
        for name in skeleton.names
        if name.endswith((".qkv", ".gate", ".out", ".q", ".k", ".v", ".gate_up", ".down"))
    }
