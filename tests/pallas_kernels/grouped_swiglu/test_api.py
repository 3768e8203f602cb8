"""Both forms of the op compute the definition, and give the gradients of float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_swiglu
from pallas_kernels.grouped_matmul.pallas_tpu.visits import Even
from pallas_kernels.grouped_swiglu import activation, pallas_tpu
from tests.pallas_kernels.grouped_matmul import oracle

E, D, F = 4, 8, 6
# Groups larger than the largest block, small, empty, and rows that belong to none.
SIZES = {600: [33, 0, 517, 40], 23: [0, 9, 1, 12], 2: [0, 1, 0, 1], 1: [0, 0, 0, 0], 0: [0] * E}


def arrays(rows, dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    shapes = ((rows, D), (E, D, 2 * F), (E, F, D), (rows, D))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(x, gate_up, down, sizes, dout):
    """The output and the gradients of x, gate_up and down, in float64."""
    x, gate_up, down, dout = (np.asarray(a, np.float64) for a in (x, gate_up, down, dout))
    hidden = oracle.grouped_matmul(x, gate_up, sizes)
    gate, up = hidden[:, :F], hidden[:, F:]
    sigmoid = 1 / (1 + np.exp(-gate))
    act = gate * sigmoid * up
    dact, ddown = oracle.gradients(act, down, sizes, dout)
    dgate = dact * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    dhidden = np.concatenate([dgate, dact * gate * sigmoid], axis=1)
    dx, dgate_up = oracle.gradients(x, gate_up, sizes, dhidden)
    return oracle.grouped_matmul(act, down, sizes), dx, dgate_up, ddown


def check(found, expected, dtype, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, np.abs(theirs).max(initial=0))
        assert np.abs(np.asarray(ours, np.float64) - theirs).max(initial=0) <= tolerance * scale


@functools.partial(jax.jit, static_argnames="implementation")
def out(x, gate_up, down, sizes, implementation):
    interpret = implementation == "pallas_tpu"
    return grouped_swiglu(
        x, gate_up, down, sizes, implementation=implementation, interpret=interpret
    )


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("implementation", [None, "xla", "composed", "pallas_tpu"])
def test_the_output_is_that_of_float64(rows, implementation):
    x, gate_up, down, dout = arrays(rows)
    sizes = jnp.asarray(SIZES[rows], jnp.int32)
    expected = exact(x, gate_up, down, SIZES[rows], dout)
    # float32 sums of at most 8 products, twice.
    check([out(x, gate_up, down, sizes, implementation)], expected[:1], jnp.float32, 1e-5)


@functools.partial(jax.jit, static_argnames="implementation")
def out_and_gradients(x, gate_up, down, sizes, dout, implementation):
    value, pull_back = jax.vjp(
        lambda *arrays: out(*arrays, sizes, implementation), x, gate_up, down
    )
    return value, *pull_back(dout)


@pytest.mark.parametrize("implementation", [None, "composed", "pallas_tpu"])
@pytest.mark.parametrize("rows", [600, 23])
def test_the_gradients_are_those_of_float64(rows, implementation):
    """Whatever rows of no group hold, in x and in the cotangent."""
    x, gate_up, down, dout = arrays(rows)
    sizes = jnp.asarray(SIZES[rows], jnp.int32)
    expected = exact(x, gate_up, down, SIZES[rows], dout)
    past_R1 = jnp.arange(rows, dtype=jnp.int32)[:, None] >= sum(SIZES[rows])
    x, dout = jnp.where(past_R1, jnp.nan, x), jnp.where(past_R1, jnp.nan, dout)
    found = out_and_gradients(x, gate_up, down, sizes, dout, implementation)
    # Sums of up to 517 products in float32.
    check(found, expected, jnp.float32, 2e-5)


def test_the_kernels_round_to_bfloat16_once_a_product():
    x, gate_up, down, dout = arrays(150, jnp.bfloat16)
    sizes = [100, 0, 7, 40]
    expected = exact(x, gate_up, down, sizes, dout)
    found = out_and_gradients(x, gate_up, down, jnp.int32(sizes), dout, "pallas_tpu")
    # The hidden rows and the activation are rounded to 8 bits before the products that take them.
    check(found, expected, jnp.bfloat16, 2**-7)


def test_the_kernels_gradient_of_one_layer_out_of_several():
    x, gate_up, down, dout = arrays(23)
    sizes = jnp.asarray(SIZES[23], jnp.int32)
    expected = out_and_gradients(x, gate_up, down, sizes, dout, "composed")

    def layer(x, gate_up, down):
        return grouped_swiglu(
            x, gate_up, down, sizes, group_offset=jnp.int32(E),
            implementation="pallas_tpu", interpret=True,
        )  # fmt: skip

    stacks = [jnp.concatenate([w + 1, w, w - 1]) for w in (gate_up, down)]
    value, pull_back = jax.jit(lambda *arrays: jax.vjp(layer, *arrays))(x, *stacks)
    dx, *dstacks = jax.jit(pull_back)(dout)
    padded = [jnp.concatenate([jnp.zeros_like(w), w, jnp.zeros_like(w)]) for w in expected[2:]]
    for ours, theirs in zip((value, dx, *dstacks), (*expected[:2], *padded), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16():
    x, gate_up, down, dout = arrays(23, jnp.bfloat16)
    expected = exact(x, gate_up, down, SIZES[23], dout)
    sizes = jnp.asarray(SIZES[23], jnp.int32)
    # The hidden rows and the activation are rounded to 8 bits before the second product.
    for implementation in ("xla", "composed"):
        found = [out(x, gate_up, down, sizes, implementation)]
        check(found, expected[:1], jnp.bfloat16, 2**-6)


def test_both_ways_to_write_the_gates_gradient_are_one():
    """CPUs and the others each have one; only the CPU's runs here by itself."""
    rng = np.random.default_rng(0)
    hidden, dact = (jnp.asarray(rng.normal(size=(7, n * F)), jnp.float32) for n in (2, 1))
    ways = (activation._in_a_third_dim, activation._side_by_side)
    found, other = (way(hidden, dact) for way in ways)
    np.testing.assert_allclose(found, other, rtol=1e-6)


def test_groups_known_to_be_even_are_those_whose_sizes_say_so():
    """What schedules are counted with gives the same numbers."""
    rows = 2 * 256
    x, gate_up, down, _ = arrays(rows)
    found, expected = (
        pallas_tpu.grouped_swiglu(x, gate_up[:2], down[:2], sizes, None, interpret=True)
        for sizes in (Even(2, 256), jnp.int32([256, 256]))
    )
    np.testing.assert_array_equal(found, expected)


def test_rows_past_the_sum_may_hold_anything():
    x, gate_up, down, _ = arrays(600)
    sizes = jnp.asarray(SIZES[600], jnp.int32)
    past_R1 = jnp.arange(600, dtype=jnp.int32)[:, None] >= sum(SIZES[600])
    for implementation in ("xla", "composed"):
        dirty = out(jnp.where(past_R1, jnp.nan, x), gate_up, down, sizes, implementation)
        clean = out(x, gate_up, down, sizes, implementation)
        np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("implementation", [None, "composed"])
def test_group_offset_picks_the_matrices_of_one_layer(implementation):
    x, gate_up, down, _ = arrays(23)
    sizes = jnp.asarray(SIZES[23], jnp.int32)
    stacks = [jnp.concatenate([w + 1, w, w - 1]) for w in (gate_up, down)]
    found = grouped_swiglu(
        x, *stacks, sizes, group_offset=jnp.int32(E), implementation=implementation
    )
    np.testing.assert_allclose(found, out(x, gate_up, down, sizes, "xla"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, g, d: (x, g[:, :, 1:], d), "2F"),
        (lambda x, g, d: (x, g, d[1:]), "2F"),
        (lambda x, g, d: (x, g[0], d), "rank 3"),
        (lambda x, g, d: (x, g, d.astype(jnp.bfloat16)), "dtype"),
    ],
)
def test_what_does_not_fit_is_said(change, words):
    x, gate_up, down, _ = arrays(23)
    with pytest.raises(ValueError, match=words):
        grouped_swiglu(*change(x, gate_up, down), jnp.asarray(SIZES[23], jnp.int32))
