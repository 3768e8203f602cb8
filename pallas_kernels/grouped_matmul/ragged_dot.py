"""jax.lax.ragged_dot: native on TPU; elsewhere XLA expands it over all groups."""

import jax
import jax.numpy as jnp
from jax import lax

# Contract the rows of both sides, one product a group.
_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def why_not(target, x_RD, w_EDF, group_sizes_E, group_offset) -> str | None:
    """Why it is not the automatic choice on this target; None if it is."""
    return None if target == "tpu" else "jax.lax.ragged_dot multiplies by every matrix off TPU"


def mask(rows_RX, group_sizes_E) -> jax.Array:
    """Zero the rows past the sum: ragged_dot does not say what it makes of them."""
    row_R1 = lax.broadcasted_iota(jnp.int32, (rows_RX.shape[0], 1), 0)
    return jnp.where(row_R1 < jnp.sum(group_sizes_E), rows_RX, 0)


def forward(x_RD, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """out_RF as in api.grouped_matmul."""
    if group_offset is not None:
        w_EDF = lax.dynamic_slice_in_dim(w_EDF, group_offset, group_sizes_E.shape[0])
    out_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=jnp.float32)
    return mask(out_RF, group_sizes_E).astype(x_RD.dtype)


def input_gradient(dout_RF, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """dx_RD: each row of dout times the transposed matrix of its group."""
    return forward(dout_RF, w_EDF.swapaxes(1, 2), group_sizes_E, group_offset)


def weight_gradient(x_RD, dout_RF, group_sizes_E) -> jax.Array:
    """dw_EDF: for each group, the transposed rows of x times the rows of dout."""
    dw_EDF = lax.ragged_dot_general(
        mask(x_RD, group_sizes_E),
        mask(dout_RF, group_sizes_E),
        group_sizes_E,
        _ROWS,
        preferred_element_type=jnp.float32,
    )
    return dw_EDF.astype(x_RD.dtype)
