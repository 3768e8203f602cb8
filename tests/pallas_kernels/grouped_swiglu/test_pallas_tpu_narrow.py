"""The TPU kernels that read eight bits, interpreted on the CPU, multiply what these stand for."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import grouped_swiglu
from pallas_kernels.grouped_matmul.pallas_tpu import sizes
from pallas_kernels.grouped_swiglu import pallas_tpu_narrow
from pallas_kernels.grouped_swiglu.pallas_tpu_narrow import Weight

L, E, D, F, LAYER = 2, 3, 256, 128, 1


def int8(draw, *shape):
    """(a weight with a scale a column, the array it stands for)."""
    values = draw.integers(-127, 128, (L, E, *shape)).astype(np.int8)
    scales = draw.uniform(0.5, 2, (L, E, 1, *shape[1:])).astype(np.float32) / 1270
    return Weight(jnp.asarray(values), jnp.asarray(scales), jnp.int8), values * scales


def fp8(draw, *shape):
    """The same as bytes, with a scale for blocks of 128 rows and 64 columns."""
    values = draw.normal(size=(L, E, *shape)).astype(ml_dtypes.float8_e4m3fn)
    count = shape[0] // 128, *shape[1:-1], shape[-1] // 64
    scales = draw.uniform(0.05, 0.2, (L, E, *count)).astype(np.float32)
    wide = values.astype(np.float32) * scales.repeat(128, axis=2).repeat(64, axis=-1)
    return Weight(jnp.asarray(values.view(np.uint8)), jnp.asarray(scales), values.dtype), wide


@pytest.mark.parametrize(
    ("make", "rows", "group_sizes", "chunk"),
    [
        # Fewer rows than a tile, an empty group, and rows of none.
        (int8, 7, [3, 0, 2], None),
        # A group that ends in the second tile; as many products a depth as there are scales.
        (fp8, 140, [60, 75, 0], None),
        # Blocks of half the depth: the second block's scales are not the first's.
        (fp8, 7, [0, 3, 4], 128),
    ],
)
def test_they_equal_the_op_with_what_the_bits_stand_for(
    make, rows, group_sizes, chunk, monkeypatch
):
    if chunk:
        tiny = sizes.Generation(
            vmem_limit=sizes._SPILLS + 3 * 2**18, cores=1, chunk=chunk, band=128, unit=128
        )
        monkeypatch.setattr(sizes, "generation", lambda: tiny)
        blocks = sizes.row_tiles(128, D, F, 4, sizes.Blocks(1, 2, 2, 1))
        assert blocks.depth == D // 2
    draw = np.random.default_rng(0)
    (gate_up, wide_gate_up), (down, wide_down) = make(draw, D, 2, F), make(draw, F, D)
    x = jnp.asarray(draw.normal(size=(rows, D)), jnp.float32)
    assert pallas_tpu_narrow.why_not(x, gate_up, down) is None
    call = functools.partial(pallas_tpu_narrow.grouped_swiglu, interpret=True)
    found = jax.jit(lambda x, *scalars: call(x, gate_up, down, *scalars))(
        x, jnp.int32(group_sizes), jnp.int32(LAYER)
    )
    wide = wide_gate_up[LAYER].reshape(E, D, 2 * F), wide_down[LAYER]
    expected = grouped_swiglu(x, *map(jnp.asarray, wide), jnp.int32(group_sizes))
    assert np.abs(expected[: sum(group_sizes)]).max() > 1
    # float32 sums of up to 256 products, twice; scales are multiplied after the sums.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("depth", "columns", "block", "reason"),
    [
        (256, 192, 128, "widths of a multiple of 128, got 256, 192"),
        (256, 128, 64, "a scale for 128 rows of a matrix, got 64"),
    ],
)
def test_what_they_cannot_take_they_refuse(depth, columns, block, reason):
    def weight(*shape):
        values = jax.ShapeDtypeStruct((L, E, *shape), jnp.int8)
        scales = (L, E, shape[0] // block, *shape[1:-1], 1)
        return Weight(values, jax.ShapeDtypeStruct(scales, jnp.float32), jnp.int8)

    x = jax.ShapeDtypeStruct((7, depth), jnp.float32)
    found = pallas_tpu_narrow.why_not(x, weight(depth, 2, columns), weight(columns, depth))
    assert reason in found
