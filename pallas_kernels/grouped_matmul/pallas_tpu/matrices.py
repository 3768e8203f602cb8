"""The gradient of the matrices: for each group, its rows of one side times those of the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.pallas_tpu import sizes, visits


def multiply(
    left_RK: jax.Array, right_PRN: jax.Array, group_sizes_E, *, name: str, interpret: Any = False
) -> jax.Array:
    """`[E, K, P N]` in the dtype of the operands: left^T right of the rows of each group.

    Rows of other groups and of none are never read as numbers. Groups without rows give zeros.

    Args:
      right_PRN: what lies side by side in the columns of the result.
      group_sizes_E: int32, or `visits.Even`.
    """
    (R, K), (P, _, N) = left_RK.shape, right_PRN.shape
    tiles = sizes.matrix_tiles(R, K, N, left_RK.dtype.itemsize)
    order = visits.of_groups(group_sizes_E, R, tiles.rows)
    per_part = N // tiles.columns

    def right_block(i, j, v, *refs):
        part = sum(((j >= p * per_part).astype(jnp.int32) for p in range(1, P)), jnp.int32(0))
        return part, order.tile(v, refs), j - part * per_part

    return pl.pallas_call(
        functools.partial(_kernel, tiles, order),
        out_shape=jax.ShapeDtypeStruct(
            (order.num_groups, K, P * N), left_RK.dtype,
            manual_axis_type=jax.typeof(left_RK).manual_axis_type,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(order.scalars),
            grid=(K // tiles.depth, P * per_part, order.num),
            in_specs=[
                pl.BlockSpec(
                    (tiles.rows, tiles.depth), lambda i, j, v, *refs: (order.tile(v, refs), i)
                ),
                pl.BlockSpec((None, tiles.rows, tiles.columns), right_block),
            ],
            out_specs=pl.BlockSpec(
                (None, tiles.depth, tiles.columns),
                lambda i, j, v, *refs: (order.group(v, refs), i, j),
            ),
            scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit,
        ),
        name=name,
        interpret=interpret,
    )(*order.scalars, left_RK, right_PRN)  # fmt: skip


def _kernel(tiles, order, *refs):
    """The rows of one group in one tile, for one block of the result."""
    *scalars, left_ref, right_ref, out_ref, sum_ref = refs
    visit, last_visit = pl.program_id(2), pl.num_programs(2) - 1
    first_row = order.tile(visit, scalars) * tiles.rows
    group = order.group(visit, scalars)
    begin = jnp.maximum(order.border(group, scalars) - first_row, 0)
    end = jnp.clip(order.border(group + 1, scalars) - first_row, 0, tiles.rows)
    is_whole = (begin == 0) & (end == tiles.rows)
    before = order.group(jnp.maximum(visit - 1, 0), scalars)
    after = order.group(jnp.minimum(visit + 1, last_visit), scalars)

    @pl.when((visit == 0) | (before != group))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(is_whole)
    def _():
        _add(tiles, sum_ref, left_ref, right_ref[...], pl.ds(0, tiles.rows), lambda x_RX: x_RX)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        def piece(i, _):
            start = pl.multiple_of(i * tiles.piece, tiles.piece)
            rows = pl.ds(start, tiles.piece)
            row_R1 = start + jax.lax.broadcasted_iota(jnp.int32, (tiles.piece, 1), 0)
            own_R1 = (row_R1 >= begin) & (row_R1 < end)

            def masked(x_RX):
                # Both sides: NaN times zero is no zero. In float32, which every generation selects.
                return jnp.where(own_R1, x_RX.astype(jnp.float32), 0.0).astype(x_RX.dtype)

            _add(tiles, sum_ref, left_ref, masked(right_ref[rows]), rows, masked)

        first, last = (jax.lax.div(x, tiles.piece) for x in (begin, end + tiles.piece - 1))
        # A group without rows has its begin at its end.
        jax.lax.fori_loop(first, jnp.where(end > begin, last, first), piece, None)

    @pl.when((visit == last_visit) | (after != group))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _add(tiles, sum_ref, left_ref, right_RN, rows, masked) -> None:
    """sum += left[rows]^T right, for one band of the left's columns after the other."""
    precision = None if right_RN.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def band(i, _):
        columns = pl.ds(pl.multiple_of(i * tiles.band, tiles.band), tiles.band)
        sum_ref[columns] += jax.lax.dot_general(
            masked(left_ref[rows, columns]), right_RN, (((0,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    jax.lax.fori_loop(0, tiles.depth // tiles.band, band, None)
