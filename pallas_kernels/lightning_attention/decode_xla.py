"""A token, or a few, after a state, in plain XLA: runs anywhere, the choice for CPUs."""

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention import xla


def decode(q_BHK, k_BHK, v_BHV, log_decay_H, state_BHKV) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence for every row; computes in the state's dtype."""
    compute = state_BHKV.dtype
    out_dtype = q_BHK.dtype
    q_BHK, k_BHK, v_BHV = (x.astype(compute) for x in (q_BHK, k_BHK, v_BHV))
    decay_1H11 = jnp.exp(log_decay_H)[None, :, None, None]
    state_BHKV = decay_1H11 * state_BHKV + k_BHK[:, :, :, None] * v_BHV[:, :, None, :]
    return jnp.einsum("bhk,bhkv->bhv", q_BHK, state_BHKV).astype(out_dtype), state_BHKV


def decode_slots(
    q_BHK, k_BHK, v_BHV, log_decay_H, pool_SHKV, slots_B
) -> tuple[jax.Array, jax.Array]:
    """Gather the states of the rows, step, scatter; rows without a slot give zeros."""
    is_live_B = (slots_B >= 0) & (slots_B < pool_SHKV.shape[0])
    states_BHKV = pool_SHKV.at[slots_B].get(mode="clip")
    out_BHV, states_BHKV = decode(q_BHK, k_BHK, v_BHV, log_decay_H, states_BHKV)
    # An index past the end is dropped; a negative one would count from the end.
    target_B = jnp.where(is_live_B, slots_B, pool_SHKV.shape[0])
    pool_SHKV = pool_SHKV.at[target_B].set(states_BHKV, mode="drop")
    return jnp.where(is_live_B[:, None, None], out_BHV, 0.0).astype(q_BHK.dtype), pool_SHKV


def extend(q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV) -> tuple[jax.Array, jax.Array]:
    """The chunked pass over a row that is seldom longer than a chunk."""
    return xla.forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, None)
