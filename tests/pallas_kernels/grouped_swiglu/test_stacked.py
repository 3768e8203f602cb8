"""One layer of a stack of weights is that layer, whether it is cut out or read in place."""

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
