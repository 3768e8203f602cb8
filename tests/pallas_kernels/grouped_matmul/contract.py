"""What every implementation of grouped_matmul promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from tests.pallas_kernels.grouped_matmul import oracle

E, D, F = 4, 8, 12
# 1100 rows: groups of more rows than the largest block, none a multiple of any block.
R = 1100
SIZES = {
    "uneven": [301, 99, 697, 3],
    "empty_groups": [0, 1099, 0, 1],
    "all_in_the_first": [1100, 0, 0, 0],
    "all_in_the_last": [0, 0, 0, 1100],
    "rows_past_the_sum": [33, 0, 517, 40],
    "no_row_in_any_group": [0, 0, 0, 0],
}


def arrays(rows, dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    shapes = ((rows, D), (E, D, F), (rows, F))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def out_and_gradients(x, w, sizes, dout, implementation, interpret=False):
    def multiply(x, w):
        return grouped_matmul(x, w, sizes, implementation=implementation, interpret=interpret)

    out, pull_back = jax.vjp(multiply, x, w)
    return out, *pull_back(dout)


class Contract:
    """Subclass with `implementation`, and `interpret` where it is a kernel of Pallas."""

    implementation: str | None
    interpret: bool = False

    def run(self, x, w, sizes_E, dout):
        return out_and_gradients(x, w, sizes_E, dout, self.implementation, self.interpret)

    def check(self, rows, sizes, dtype=jnp.float32, tolerance=1e-5):
        """Outputs and both gradients, relative to the largest entry, against float64."""
        x, w, dout = arrays(rows, dtype)
        sizes_E = jnp.asarray(sizes, jnp.int32)
        found = self.run(x, w, sizes_E, dout)
        x, w, dout = (np.asarray(a, np.float64) for a in (x, w, dout))
        expected = (oracle.grouped_matmul(x, w, sizes), *oracle.gradients(x, w, sizes, dout))
        for name, ours, exact in zip(("out", "dx", "dw"), found, expected, strict=True):
            assert ours.dtype == dtype, name
            scale = max(1.0, np.abs(exact).max(initial=0))
            error = np.abs(np.asarray(ours, np.float64) - exact).max(initial=0)
            assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_out_and_gradients_are_those_of_float64(self, sizes):
        # float32 sums of up to 1100 products: about sqrt(1100) roundings of 6e-8.
        self.check(R, sizes)

    @pytest.mark.parametrize(
        "sizes", ([0, 1, 0, 1], [2, 0, 0, 0], [0, 0, 1, 0]), ids=("apart", "together", "past_sum")
    )
    def test_two_rows(self, sizes):
        self.check(2, sizes)

    def test_few_rows_more_than_a_small_block(self):
        self.check(23, [0, 9, 1, 12])

    def test_one_row(self):
        self.check(1, [0, 0, 1, 0])

    def test_no_rows(self):
        self.check(0, [0, 0, 0, 0])

    def test_bfloat16_in_and_out_with_float32_sums(self):
        # Half a unit in the last of 8 bits, once; sums of 100 terms in bfloat16 would round often.
        self.check(150, [100, 0, 7, 40], jnp.bfloat16, tolerance=2**-8)

    def test_rows_past_the_sum_may_hold_anything(self):
        sizes = SIZES["rows_past_the_sum"]
        x, w, dout = arrays(R)
        past_R1 = jnp.arange(R, dtype=jnp.int32)[:, None] >= sum(sizes)
        sizes_E = jnp.asarray(sizes, jnp.int32)
        clean = self.run(x, w, sizes_E, jnp.where(past_R1, 0, dout))
        x, dout = jnp.where(past_R1, jnp.nan, x), jnp.where(past_R1, jnp.nan, dout)
        dirty = self.run(x, w, sizes_E, dout)
        for name, ours, expected in zip(("out", "dx", "dw"), dirty, clean, strict=True):
            np.testing.assert_array_equal(ours, expected, err_msg=name)

    def test_group_offset_picks_the_matrices_of_one_layer(self):
        x, w, dout = arrays(23)
        sizes_E = jnp.asarray([0, 9, 1, 12], jnp.int32)
        expected = self.run(x, w, sizes_E, dout)
        layers = jnp.concatenate([w + 1, w, w - 1])

        @jax.jit
        def with_offset(offset):
            out, pull_back = jax.vjp(
                lambda x, w: grouped_matmul(
                    x,
                    w,
                    sizes_E,
                    group_offset=offset,
                    implementation=self.implementation,
                    interpret=self.interpret,
                ),
                x,
                layers,
            )
            return out, *pull_back(dout)

        out, dx, dw = with_offset(jnp.int32(E))
        padding = jnp.zeros_like(w)
        expected_dw = jnp.concatenate([padding, expected[2], padding])
        for ours, theirs in zip((out, dx, dw), (*expected[:2], expected_dw), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
