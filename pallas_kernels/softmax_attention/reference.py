"""The definition: every score at once, in float32."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def softmax_attention(q_BTHK, k_BSGK, v_BSGV, q_segment_ids, kv_segment_ids, q_offset):
    """See api.softmax_attention; memory and time grow with T x S."""
    B, T, H, K = q_BTHK.shape
    _, S, G, V = v_BSGV.shape
    q_BTGRK = q_BTHK.astype(jnp.float32).reshape(B, T, G, H // G, K)
    k_BSGK, v_BSGV = k_BSGK.astype(jnp.float32), v_BSGV.astype(jnp.float32)
    score_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, precision=HIGHEST) * K**-0.5

    visible_BTS = visible(B, T, S, q_segment_ids, kv_segment_ids, q_offset)
    visible_B11TS = visible_BTS[:, None, None]
    # A masked score is replaced before exp as well as after it, so that a row that sees nothing has
    # a gradient of 0 and not of 0 * inf.
    top_BGRT1 = jnp.max(score_BGRTS, axis=-1, keepdims=True, where=visible_B11TS, initial=-1e30)
    score_BGRTS = jnp.where(visible_B11TS, score_BGRTS - jax.lax.stop_gradient(top_BGRT1), 0.0)
    weight_BGRTS = jnp.where(visible_B11TS, jnp.exp(score_BGRTS), 0.0)
    total_BGRT1 = jnp.sum(weight_BGRTS, axis=-1, keepdims=True)
    weight_BGRTS = weight_BGRTS / jnp.where(total_BGRT1 > 0, total_BGRT1, 1.0)
    out_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", weight_BGRTS, v_BSGV, precision=HIGHEST)
    return out_BTGRV.reshape(B, T, H, V).astype(q_BTHK.dtype)


def visible(B, T, S, q_segment_ids, kv_segment_ids, q_offset):
    """Which key each query may see, [B, T, S]."""
    offset_B = jnp.zeros(B, jnp.int32) if q_offset is None else q_offset.astype(jnp.int32)
    index_BT = offset_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    seen_BTS = index_BT[:, :, None] >= jnp.arange(S, dtype=jnp.int32)[None, None]
    if q_segment_ids is None:
        return seen_BTS
    same_BTS = q_segment_ids[:, :, None] == kv_segment_ids[:, None].astype(q_segment_ids.dtype)
    return seen_BTS & same_BTS & (q_segment_ids != 0)[:, :, None]
