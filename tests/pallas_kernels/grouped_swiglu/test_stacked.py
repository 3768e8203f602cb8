"""One layer of a stack of weights is that layer, whether it is cut out or read in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_swiglu, grouped_swiglu_of_layer
from pallas_kernels.grouped_swiglu import stacked


@pytest.mark.parametrize("function", [grouped_swiglu_of_layer, stacked.in_place, stacked.cut_out])
def test_it_equals_the_op_with_that_layers_weights(function):
    L, E, D, F, R, layer = 3, 4, 8, 6, 10, 1
    draw = np.random.default_rng(0).standard_normal
    x = jnp.asarray(draw((R, D)), jnp.float32)
    gate_up = jnp.asarray(draw((L, E, D, 2, F)), jnp.float32)
    down = jnp.asarray(draw((L, E, F, D)), jnp.float32)
    # An empty group, and a row of none.
    sizes = jnp.array([3, 0, 4, 2], jnp.int32)
    expected = grouped_swiglu(x, gate_up[layer].reshape(E, D, 2 * F), down[layer], sizes)
    found = jax.jit(function)(x, gate_up, down, sizes, jnp.int32(layer))
    # The same products in the same blocks; fused differently, so rounded differently.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [grouped_swiglu_of_layer, stacked.one_by_one, stacked.cut_out, stacked.cut_out_narrow],
)
def test_weights_that_are_no_arrays_are_widened_before_they_are_multiplied(function):
    L, E, D, F, R, layer = 2, 3, 8, 6, 7, 1
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((R, D)), jnp.float32)

    def stored(*shape):
        values = draw.integers(-127, 128, (L, E, *shape)).astype(np.int8)
        # One scale a matrix: those of another layer or group would show.
        return jnp.asarray(values), jnp.asarray(draw.uniform(0.5, 2, (L, E)), jnp.float32) / 127

    def widen(weight, dtype):
        values, scales = weight
        rest = values.ndim - scales.ndim
        return values.astype(dtype) * scales.reshape(scales.shape + (1,) * rest).astype(dtype)

    gate_up, down = stored(D, 2, F), stored(F, D)
    sizes = jnp.array([3, 0, 4], jnp.int32)
    wide = [widen(w, jnp.float32)[layer] for w in (gate_up, down)]
    expected = grouped_swiglu(x, wide[0].reshape(E, D, 2 * F), wide[1], sizes)
    is_op = function is grouped_swiglu_of_layer
    how = {"narrow": stacked.Narrow(widen)} if is_op else {"widen": widen}
    found = jax.jit(functools.partial(function, **how))(x, gate_up, down, sizes, jnp.int32(layer))
    # The same products, fused differently, so rounded differently.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
