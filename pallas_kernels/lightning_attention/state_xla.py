"""States of lightning attention without its outputs, as decayed sums in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention import xla

# Tokens a product: long enough for any matrix unit, and the decayed keys take little memory.
_CHUNK = 1024
# A distance over which nothing is handed on.
_NEVER = -1


def forward(
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    zeros_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
    chunk: int = _CHUNK,
) -> jax.Array:
    """The state after the last token: the sum of k_t v_t^T, each decayed by the tokens after it."""
    length = k_BTHK.shape[1]
    if segment_ids_BT is None:
        distance_bT = jnp.arange(length - 1, -1, -1, dtype=jnp.int32)[None, :]
    else:
        is_real_BT, count_BT, run_BT = _count(segment_ids_BT)
        is_open_BT = is_real_BT & (run_BT == run_BT[:, -1:])
        distance_bT = jnp.where(is_open_BT, count_BT[:, -1:] - count_BT, _NEVER)
    return _decayed_sum(k_BTHK, v_BTHV, log_decay_H, zeros_BHKV, distance_bT, chunk)


def backward(
    q_BTHK: jax.Array,
    dout_BTHV: jax.Array,
    log_decay_H: jax.Array,
    zeros_BHKV: jax.Array,
    segment_ids_BT: jax.Array | None,
    chunk: int = _CHUNK,
) -> jax.Array:
    """The gradient of the state before the first token: each q_t dout_t^T decayed on its way."""
    length = q_BTHK.shape[1]
    if segment_ids_BT is None:
        distance_bT = jnp.arange(1, length + 1, dtype=jnp.int32)[None, :]
    else:
        is_real_BT, count_BT, run_BT = _count(segment_ids_BT)
        distance_bT = jnp.where(is_real_BT & (run_BT == 0), count_BT, _NEVER)
    return _decayed_sum(q_BTHK, dout_BTHV, log_decay_H, zeros_BHKV, distance_bT, chunk)


def _count(segment_ids_BT):
    """Which tokens are real, the real ones up to and with each, and the changes of id so far."""
    is_real_BT, is_change_BT = xla.locate(segment_ids_BT)
    counts = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (is_real_BT, is_change_BT))
    return is_real_BT, *counts


def _decayed_sum(x_BTHK, y_BTHV, log_decay_H, sum_BHKV, distance_bT, chunk):
    """`sum_BHKV` and the sum over t of exp(log_decay distance_t) x_t y_t^T, in its dtype."""

    def body(index, size, sum_BHKV):
        def cut(x, dim=1):
            return jax.lax.dynamic_slice_in_dim(x, index * chunk, size, axis=dim)

        distance_bC11 = cut(distance_bT)[:, :, None, None]
        is_open_bC11 = distance_bC11 >= 0
        exponent_bCH1 = distance_bC11.astype(sum_BHKV.dtype) * log_decay_H[None, None, :, None]
        decay_bCH1 = jnp.exp(jnp.where(is_open_bC11, exponent_bCH1, -jnp.inf))
        # Both factors, for padding may hold anything, and zero times NaN is none.
        x_BCHK, y_BCHV = (
            jnp.where(is_open_bC11, cut(x).astype(sum_BHKV.dtype), 0.0) for x in (x_BTHK, y_BTHV)
        )
        return sum_BHKV + jnp.einsum(
            "bchk,bchv->bhkv", decay_bCH1 * x_BCHK, y_BCHV, precision="highest"
        )

    return xla.each_chunk(x_BTHK.shape[1], chunk, body, sum_BHKV)
