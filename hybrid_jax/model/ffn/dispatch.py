"""Tokens to rows in the order of their experts, and the rows back to weighted sums."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def to_rows(x_TD, token_R, row_TA):
    """Rows of x in expert order: row r is token token_R[r]."""
    return x_TD[token_R]


def _to_rows_fwd(x_TD, token_R, row_TA):
    return x_TD[token_R], row_TA


def _to_rows_bwd(row_TA, dx_RD):
    # Every token stands in A rows, so the transpose is a gather too; a scatter-add is far slower.
    ones_TA = jnp.ones(row_TA.shape, jnp.float32)
    return _sum_of_rows(dx_RD, ones_TA, row_TA).astype(dx_RD.dtype), None, None


to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)


@jax.custom_vjp
def combine(y_RD, weight_TA, token_R, row_TA):
    """Weighted sum of each token's A rows, in float32."""
    return _sum_of_rows(y_RD, weight_TA, row_TA)


# From so many tokens on, rows are gathered choice by choice.
_MANY_TOKENS = 128


def _sum_of_rows(x_RD, weight_TA, row_TA):
    """sum_a weight_ta * x[row_ta], in float32."""
    T, A = row_TA.shape
    if T < _MANY_TOKENS:
        x_TAD = x_RD[row_TA]
        return jnp.einsum("tad,ta->td", x_TAD, weight_TA, preferred_element_type=jnp.float32)
    # A TPU holds [T, A, D] with A rows in a tile for 8: its sum alone took 2.7 ms by the compiler's
    # estimate (8192 tokens of 2 x 6144, v5p).
    parts = (weight_TA[:, a, None] * x_RD[row_TA[:, a]].astype(jnp.float32) for a in range(A))
    return sum(parts)


def _combine_fwd(y_RD, weight_TA, token_R, row_TA):
    return combine(y_RD, weight_TA, token_R, row_TA), (y_RD, weight_TA, token_R, row_TA)


def _combine_bwd(residuals, dout_TD):
    y_RD, weight_TA, token_R, row_TA = residuals
    weight_R = (
        jnp.zeros(token_R.shape, weight_TA.dtype)
        .at[row_TA.reshape(-1)]
        .set(weight_TA.reshape(-1), unique_indices=True)
    )
    # In the dtype of the rows, which their gradient gets anyway: half the bytes to gather.
    dout_RD = dout_TD.astype(y_RD.dtype)[token_R].astype(jnp.float32)
    dy_RD = (weight_R[:, None] * dout_RD).astype(y_RD.dtype)
    dweight_R = jnp.sum(dout_RD * y_RD.astype(jnp.float32), axis=-1)
    return dy_RD, dweight_R[row_TA], None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def expert_order(expert_TA, num_experts: int):
    """(token of each sorted row [R], sorted row of each choice [T, A], rows of each expert [E])."""
    T, A = expert_TA.shape
    expert_R = expert_TA.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
    row_R = (
        jnp.zeros((T * A,), jnp.int32)
        .at[order_R]
        .set(jnp.arange(T * A, dtype=jnp.int32), unique_indices=True)
    )
    sizes_E = jnp.bincount(expert_R, length=num_experts).astype(jnp.int32)
    return order_R // A, row_R.reshape(T, A), sizes_E
