"""Splash attention, the TPU kernel that JAX ships, behind our layout and padding.

It is called below its public face, which hides the logsumexp that a backward of its own needs, and
whose block tables cost a Python loop over all T x T scores.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)

from pallas_kernels.softmax_attention import tiles

# Tokens of a tile, the largest that divides the row: all fit the VMEM of every TPU compiled for.
BLOCKS = (1024, 512, 256, 128)
KEYS_AT_ONCE = 512
# Two tables of (T / tile)^2 entries lie in scalar memory.
MAX_TILES = 256
# Where order hides nothing the kernel visits every tile, and masks by segments alone.
_NO_TABLES = (*(splash_attention_mask_info.MaskInfo(*[None] * 5),) * 2, None)


def why_not(
    target, q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *, causal=True
) -> str | None:
    """Why splash attention cannot serve this call on this target; None if it can."""
    (T, K), (S, V) = (q_BTHK.shape[1], q_BTHK.shape[3]), (v_BSGV.shape[1], v_BSGV.shape[3])
    if target != "tpu":
        return "splash attention is a TPU kernel"
    if offset_B is not None or T != S:
        return "splash attention takes whole rows, queries and keys from 0: no q_offset, T = S"
    if T % BLOCKS[-1] or T // _block(T) > MAX_TILES:
        return (
            f"splash attention needs T as a multiple of {BLOCKS[-1]} with at most {MAX_TILES} "
            f"tiles of {BLOCKS}, got T={T}"
        )
    if any(size % 64 or size > 256 for size in (K, V)):
        return f"splash attention needs heads of a multiple of 64 up to 256, got {K} and {V}"
    return None


def forward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *, causal=True):
    """Output in q's dtype, and the logsumexp [B, T, H] of each query's scores."""
    T = q_BTHK.shape[1]
    tables, _, mask_function = _causal_tables(T) if causal else _NO_TABLES

    def one_row(q_HTK, k_GSK, v_GSV, segments):
        options = {**_options(T, mask_function), "save_residuals": True}
        return splash_attention_kernel._splash_attention_forward(
            tables, q_HTK, k_GSK, v_GSV, segments, None, **options
        )

    args = _heads_first(q_BTHK, k_BSGK, v_BSGV)
    args = *args, _segments(q_segment_BT, kv_segment_BS)
    out_BHTV, (logsumexp_BHT,) = jax.vmap(one_row)(*args)
    out_BTHV, logsumexp_BTH = out_BHTV.swapaxes(1, 2), logsumexp_BHT.swapaxes(1, 2)
    return _where_seen(out_BTHV, logsumexp_BTH, q_segment_BT, tiles.NO_SCORE)


def backward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *results, causal=True):
    """Gradients of q, k and v; `results` are the forward's and the cotangent of its output."""
    out_BTHV, logsumexp_BTH, d_out_BTHV = results
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    query_tables, key_tables, mask_function = _causal_tables(T) if causal else _NO_TABLES
    # Padding sees padding in the kernel: a weight of 0, and not of exp(1e30), meets its zeros.
    d_out_BTHV, logsumexp_BTH = _where_seen(
        d_out_BTHV, logsumexp_BTH, q_segment_BT, -tiles.NO_SCORE
    )

    def one_row(q_HTK, k_GSK, v_GSV, segments, out_HTV, logsumexp_HT, d_out_HTV):
        residuals = (
            *(q_HTK, k_GSK, v_GSV, segments, None, out_HTV, logsumexp_HT),
            *(query_tables, key_tables),
        )
        gradients = splash_attention_kernel._splash_attention_bwd(
            save_residuals=False, **_options(T, mask_function), res=residuals, do=d_out_HTV
        )
        return gradients[3:6]

    args = (
        *_heads_first(q_BTHK, k_BSGK, v_BSGV),
        _segments(q_segment_BT, kv_segment_BS),
        *(x.swapaxes(1, 2) for x in (out_BTHV, logsumexp_BTH, d_out_BTHV)),
    )
    gradients = jax.vmap(one_row)(*args)
    dq_BTHK, dk_BSGK, dv_BSGV = (x.swapaxes(1, 2) for x in gradients)
    dq_BTHK = (dq_BTHK.astype(jnp.float32) * K**-0.5).astype(q_BTHK.dtype)
    return dq_BTHK, dk_BSGK, dv_BSGV


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


def _options(length: int, mask_function) -> dict:
    """What forward and backward are called with alike."""
    size = _block(length)
    # The fused backward would hold dq once for every tile of keys, which is T x T again.
    block_sizes = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=min(size, KEYS_AT_ONCE),
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=min(size, KEYS_AT_ONCE),
        block_q_dq=size,
        block_kv_dq=size,
    )
    return dict(
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        is_mqa=False,
        block_sizes=block_sizes,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        attn_logits_soft_cap=None,
        interpret=False,
    )


@functools.cache
def _causal_tables(length: int):
    """Which tiles hold a visible score: tables for tiles of queries, of keys, and the mask.

    JAX finds them by looking at every score. They depend on the number of tiles alone, so they are
    those of a row with tiles of two tokens.
    """
    small = 2 * (length // _block(length))
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((small, small))])
    queries, mask_function = splash_attention_mask_info.process_mask(mask, (2, 2))
    keys, _ = splash_attention_mask_info.process_mask_dkv(mask, (2, 2))
    index_T = np.arange(length, dtype=np.int32)
    return queries._replace(q_sequence=index_T), keys._replace(q_sequence=index_T), mask_function


def _heads_first(q_BTHK, k_BSGK, v_BSGV):
    """Heads before tokens, the queries scaled: the kernel does not scale scores."""
    q_BTHK = (q_BTHK.astype(jnp.float32) * q_BTHK.shape[3] ** -0.5).astype(q_BTHK.dtype)
    return tuple(x.swapaxes(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))


def _segments(q_segment_BT, kv_segment_BS):
    if q_segment_BT is None:
        return None
    segments = (x.astype(jnp.int32) for x in (q_segment_BT, kv_segment_BS))
    return splash_attention_kernel.SegmentIds(*segments)


def _where_seen(x_BTHV, logsumexp_BTH, q_segment_BT, otherwise: float):
    """Zeros, and `otherwise` for the logsumexp, at queries of padding or without keys.

    To the kernel padding is a segment like others. With a cotangent of 0 a query adds nothing to
    any gradient.
    """
    if q_segment_BT is None:
        return x_BTHV, logsumexp_BTH
    seen_BTH = (q_segment_BT != 0)[:, :, None] & (logsumexp_BTH > tiles.NO_SCORE / 2)
    out_BTHV = jnp.where(seen_BTH[..., None], x_BTHV, 0)
    return out_BTHV, jnp.where(seen_BTH, logsumexp_BTH, otherwise)
