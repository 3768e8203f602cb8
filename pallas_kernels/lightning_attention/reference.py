"""The definition of lightning attention: one token after the other, in float32."""

import jax
import jax.numpy as jnp


@jax.jit
def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    initial_state_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = decay S_{t-1} + k_t v_t^T and out_t = q_t S_t, over the real tokens of each segment.

    Computes in the state's dtype. Differentiable by JAX; that stores a state a token.
    """
    compute = initial_state_BHKV.dtype
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(q_BTHK, shape=q_BTHK.shape[:2], dtype=jnp.int32)
    decay_1H11 = jnp.exp(log_decay_H)[None, :, None, None]

    def token(carry, inputs):
        state_BHKV, current_id_B = carry
        q_BHK, k_BHK, v_BHV, id_B = inputs
        is_real_B = id_B != 0
        is_reset_B = is_real_B & (current_id_B != 0) & (id_B != current_id_B)
        is_real_B11, is_reset_B111 = is_real_B[:, None, None], is_reset_B[:, None, None, None]
        q_BHK, k_BHK, v_BHV = (
            jnp.where(is_real_B11, x.astype(compute), 0.0) for x in (q_BHK, k_BHK, v_BHV)
        )
        kept_BHKV = jnp.where(is_reset_B111, 0.0, state_BHKV)
        next_BHKV = decay_1H11 * kept_BHKV + k_BHK[:, :, :, None] * v_BHV[:, :, None, :]
        next_BHKV = jnp.where(is_real_B11[..., None], next_BHKV, state_BHKV)
        out_BHV = jnp.einsum("bhk,bhkv->bhv", q_BHK, next_BHKV, precision="highest")
        return (next_BHKV, jnp.where(is_real_B, id_B, current_id_B)), out_BHV

    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (q_BTHK, k_BTHK, v_BTHV, segment_ids_BT))
    no_id_B = jnp.zeros_like(segment_ids_BT, shape=segment_ids_BT.shape[:1])
    (final_BHKV, _), out_TBHV = jax.lax.scan(token, (initial_state_BHKV, no_id_B), inputs)
    return jnp.moveaxis(out_TBHV, 0, 1).astype(q_BTHK.dtype), final_BHKV
