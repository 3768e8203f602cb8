"""Grouped matmul in plain XLA: one dense matmul a block of rows, and no padding of the arrays.

Each group is cut into blocks from the largest size down, and a loop with a traced trip count runs
over each size; only the last, smallest block may reach past its group, and is masked. So no row is
copied to a padded layout, the waste is under one smallest block a group, and the matrix of a group
is sliced out once. Carries are updated in place: XLA copies the whole carry in the branches of a
`lax.switch`, but not in loops, which is why a choice of block size is a loop of zero or one trips.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Rows of one matmul, measured on CPU: more sizes win nothing and cost compile time.
BLOCKS = (512, 256, 64, 16)
# With few rows a group (decode), the smallest block by the greatest mean rows a group it is for.
SMALL_BLOCKS = ((2, 1), (8, 4))


class _Groups(NamedTuple):
    start_E: jax.Array
    end_E: jax.Array
    active_E: jax.Array
    """Ids of the groups with rows, ascending; what follows the first num_active is meaningless."""
    num_active: jax.Array


class _Block(NamedTuple):
    """`size` rows from row `first`; `own_R1` marks those of the group, None where all are."""

    first: jax.Array
    size: int
    own_R1: jax.Array | None

    def read(self, rows_RX) -> jax.Array:
        return lax.dynamic_slice(rows_RX, (self.first, 0), (self.size, rows_RX.shape[1]))

    def read_own(self, rows_RX) -> jax.Array:
        """The group's rows, zeros for others (whose values may be anything)."""
        read_RX = self.read(rows_RX)
        return read_RX if self.own_R1 is None else jnp.where(self.own_R1, read_RX, 0)

    def write(self, rows_RX, new_RX) -> jax.Array:
        if self.own_R1 is not None:
            new_RX = jnp.where(self.own_R1, new_RX, self.read(rows_RX))
        return lax.dynamic_update_slice(rows_RX, new_RX, (self.first, 0))


def forward(x_RD, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """out_RF as in api.grouped_matmul."""
    return _rows_times_matrix(x_RD, w_EDF, group_sizes_E, group_offset, contract=0)


def input_gradient(dout_RF, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """dx_RD: each row of dout times the transposed matrix of its group."""
    return _rows_times_matrix(dout_RF, w_EDF, group_sizes_E, group_offset, contract=1)


def weight_gradient(x_RD, dout_RF, group_sizes_E) -> jax.Array:
    """dw_EDF: for each group, the transposed rows of x times the rows of dout."""
    num_rows, D = x_RD.shape
    F = dout_RF.shape[1]
    if F < D:
        return weight_gradient(dout_RF, x_RD, group_sizes_E).swapaxes(1, 2)
    groups = _groups(group_sizes_E, num_rows)

    def one_group(i, dw_EDF):
        group = groups.active_E[i]

        def one_block(block, sum_DF):
            # Contracting dim 0 of both sides leaves XLA's fast CPU matmul: transpose the narrower
            # side, in the copy that cuts out the block. The barrier keeps XLA from undoing it.
            x_DR = lax.optimization_barrier(block.read_own(x_RD).T)
            dout_block = block.read_own(dout_RF)
            return sum_DF + lax.dot(x_DR, dout_block, preferred_element_type=jnp.float32)

        sum_DF = _zeros((D, F), jnp.float32, like=x_RD)
        sum_DF = _for_each_block(groups, group, num_rows, one_block, sum_DF)
        return lax.dynamic_update_slice(dw_EDF, sum_DF[None].astype(dw_EDF.dtype), (group, 0, 0))

    dw_EDF = _zeros((group_sizes_E.shape[0], D, F), x_RD.dtype, like=x_RD)
    return lax.fori_loop(0, groups.num_active, one_group, dw_EDF)


def _rows_times_matrix(rows_RX, w_EDF, group_sizes_E, group_offset, contract: int) -> jax.Array:
    """Each row times its group's matrix [D, F], contracted over dim `contract` of the matrix."""
    num_rows = rows_RX.shape[0]
    groups = _groups(group_sizes_E, num_rows)
    dims = (((1,), (contract,)), ((), ()))

    def one_group(i, out_RY):
        group = groups.active_E[i]
        index = group if group_offset is None else group_offset + group
        w_DF = lax.dynamic_index_in_dim(w_EDF, index, keepdims=False)

        def one_block(block, out_RY):
            new_RY = lax.dot_general(
                block.read(rows_RX), w_DF, dims, preferred_element_type=jnp.float32
            )
            return block.write(out_RY, new_RY.astype(out_RY.dtype))

        return _for_each_block(groups, group, num_rows, one_block, out_RY)

    out_RY = _zeros((num_rows, w_EDF.shape[2 - contract]), rows_RX.dtype, like=rows_RX)
    return lax.fori_loop(0, groups.num_active, one_group, out_RY)


def _groups(group_sizes_E, num_rows: int) -> _Groups:
    """Where groups begin and end (never past the rows), and which have any."""
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E), num_rows)
    start_E = jnp.concatenate([jnp.zeros_like(end_E[:1]), end_E[:-1]])
    count_1E = jnp.cumsum((end_E > start_E).astype(jnp.int32))[None, :]
    nth_E1 = jnp.arange(end_E.shape[0], dtype=jnp.int32)[:, None]
    active_E = jnp.sum((count_1E <= nth_E1).astype(jnp.int32), axis=1)
    return _Groups(start_E, end_E, active_E, count_1E[0, -1])


def _block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Block sizes from the largest down; at most the last one computes rows in vain."""
    small = (size for mean, size in SMALL_BLOCKS if num_rows <= mean * num_groups)
    last = min(next(small, BLOCKS[-1]), num_rows)
    # A block of all rows would not depend on its loop, and XLA would compute it outside, always.
    return tuple(size for size in BLOCKS if last < size < num_rows) + (last,)


def _for_each_block(
    groups: _Groups, group, num_rows: int, body: Callable[[_Block, Any], Any], carry
) -> Any:
    """Run `carry = body(block, carry)` over the blocks of one group."""
    first, end = groups.start_E[group], groups.end_E[group]
    sizes = _block_sizes(num_rows, groups.start_E.shape[0])
    for size in sizes[:-1]:
        count = (end - first) // size
        carry = lax.fori_loop(
            0,
            count,
            lambda i, carry, size=size, first=first: body(
                _Block(first + i * size, size, None), carry
            ),
            carry,
        )
        first = first + count * size
    size = sizes[-1]

    def last_block(i, carry):
        begin = first + i * size
        # Move a block that would reach past the array up; rows above `begin` are done already.
        moved = jnp.minimum(begin, num_rows - size)
        row_R1 = moved + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        return body(_Block(moved, size, (row_R1 >= begin) & (row_R1 < end)), carry)

    return lax.fori_loop(0, (end - first + size - 1) // size, last_block, carry)


def _zeros(shape: tuple[int, ...], dtype, like) -> jax.Array:
    """Zeros that vary over the manual mesh axes of `like`, as a loop's carry must."""
    axes = jax.typeof(like).manual_axis_type.varying
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros
