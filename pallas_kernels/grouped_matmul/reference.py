"""The definition: every row times every matrix in float32, then the row's own is kept."""

import jax
import jax.numpy as jnp
from jax import lax


def grouped_matmul(x_RD, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """out_RF as in api.grouped_matmul; E times the work, differentiated by JAX."""
    if group_offset is not None:
        w_EDF = lax.dynamic_slice_in_dim(w_EDF, group_offset, group_sizes_E.shape[0])
    row_R1 = jnp.arange(x_RD.shape[0], dtype=jnp.int32)[:, None]
    end_1E = jnp.cumsum(group_sizes_E)[None, :]
    own_RE = (row_R1 >= end_1E - group_sizes_E[None, :]) & (row_R1 < end_1E)
    # Rows of no group may hold anything; zero them before they meet a matrix.
    x_RD = jnp.where(jnp.any(own_RE, axis=1, keepdims=True), x_RD, 0).astype(jnp.float32)
    all_REF = jnp.einsum("rd,edf->ref", x_RD, w_EDF.astype(jnp.float32), precision="highest")
    out_RF = jnp.sum(jnp.where(own_RE[:, :, None], all_REF, 0), axis=1)
    return out_RF.astype(w_EDF.dtype)
