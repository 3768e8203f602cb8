"""Grouped matmul in plain XLA: one dense matmul a block of rows, and no padding of the arrays."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import blocks


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
    groups = blocks.find_groups(group_sizes_E, num_rows)

    def one_group(i, dw_EDF):
        group = groups.active_E[i]

        def one_block(block, sum_DF):
            # Contracting dim 0 of both sides leaves XLA's fast CPU matmul: transpose the narrower
            # side, in the copy that cuts out the block. The barrier keeps XLA from undoing it.
            x_DR = lax.optimization_barrier(block.read_own(x_RD).T)
            dout_block = block.read_own(dout_RF)
            return sum_DF + lax.dot(x_DR, dout_block, preferred_element_type=jnp.float32)

        sum_DF = blocks.zeros((D, F), jnp.float32, like=x_RD)
        sum_DF = blocks.for_each_block(groups, group, num_rows, one_block, sum_DF)
        return lax.dynamic_update_slice(dw_EDF, sum_DF[None].astype(dw_EDF.dtype), (group, 0, 0))

    dw_EDF = blocks.zeros((group_sizes_E.shape[0], D, F), x_RD.dtype, like=x_RD)
    return lax.fori_loop(0, groups.num_active, one_group, dw_EDF)


def _rows_times_matrix(rows_RX, w_EDF, group_sizes_E, group_offset, contract: int) -> jax.Array:
    """Each row times its group's matrix [D, F], contracted over dim `contract` of the matrix."""
    num_rows = rows_RX.shape[0]
    groups = blocks.find_groups(group_sizes_E, num_rows)
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

        return blocks.for_each_block(groups, group, num_rows, one_block, out_RY)

    out_RY = blocks.zeros((num_rows, w_EDF.shape[2 - contract]), rows_RX.dtype, like=rows_RX)
    return lax.fori_loop(0, groups.num_active, one_group, out_RY)
