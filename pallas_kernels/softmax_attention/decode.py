"""One query a row against its cache: the cache is read once, where possible as far as it is filled.

A batched product over key-value heads would copy the cache to bring the heads before the keys. Here
all heads of a key are one vector [G*K], and each query is zero outside its own head's part: G times
the arithmetic of a product that waits for memory, and no copy.

Local letters beside the house alphabet: X = G*K, Y = G*V, J = keys of a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.softmax_attention import tiles

# Bytes of cache to a step of the loop: enough to hide a step's cost, few enough to stop soon after
# the filled part and to keep the copy of a block in the processor's cache.
BLOCK_BYTES = 2**21


class Partial(NamedTuple):
    """Attention over some of the keys: sum of weighted values, top score, sum of weights."""

    out_BHY: jax.Array
    top_BH1: jax.Array
    total_BH1: jax.Array


def forward(q_B1HK, k_BSGK, v_BSGV, q_segment_B1, kv_segment_BS, offset_B):
    """Output in q's dtype and logsumexp [B, 1, H]; arguments as in xla.softmax_attention."""
    B, _, H, K = q_B1HK.shape
    _, S, G, V = v_BSGV.shape
    index_1S = jnp.arange(S, dtype=jnp.int32)[None]
    visible_BS = index_1S <= offset_B[:, None]
    if q_segment_B1 is not None:
        visible_BS &= kv_segment_BS == q_segment_B1.astype(kv_segment_BS.dtype)
        visible_BS &= q_segment_B1 != 0
    spread_BHX = _spread(q_B1HK[:, 0].astype(jnp.float32) * K**-0.5, G)
    cache = k_BSGK.reshape(B, S, G * K), v_BSGV.reshape(B, S, G * V), visible_BS

    J = block_size(S, B * G * (K + V) * k_BSGK.dtype.itemsize)
    whole = functools.partial(_attend, spread_BHX)
    if 2 * J >= S:
        out_BHY, top_BH1, total_BH1 = whole(*cache)
    else:
        # XLA copies a block before it multiplies; over a full cache that costs more than it saves.
        filled = jnp.clip(jnp.max(offset_B) + 1, 0, S)
        blocks = functools.partial(_attend_filled, spread_BHX, filled, J)
        out_BHY, top_BH1, total_BH1 = lax.cond(2 * filled > S, whole, blocks, *cache)
    total_BH1 = jnp.where(total_BH1 > 0, total_BH1, 1.0)
    logsumexp_BH1 = top_BH1 + jnp.log(total_BH1)
    out_BHV = _own_part(out_BHY / total_BH1, G)
    return out_BHV[:, None].astype(q_B1HK.dtype), logsumexp_BH1.swapaxes(1, 2)


def _attend(spread_BHX, k_BJX, v_BJY, visible_BJ) -> Partial:
    """All the given keys at once."""
    # Keys as rows of the product: for one row of the batch that takes a third less than queries as
    # rows, and for several XLA turns it around. The queries must come here as [B, H, X] for that.
    score_BJH = jnp.einsum("bhx,bjx->bjh", spread_BHX, k_BJX.astype(jnp.float32))
    score_BHJ = jnp.where(visible_BJ[:, None], score_BJH.swapaxes(1, 2), -jnp.inf)
    top_BH1 = jnp.max(score_BHJ, axis=-1, keepdims=True, initial=tiles.NO_SCORE)
    weight_BHJ = jnp.exp(score_BHJ - top_BH1)
    out_BHY = jnp.einsum("bhj,bjy->bhy", weight_BHJ, v_BJY.astype(jnp.float32))
    return Partial(out_BHY, top_BH1, weight_BHJ.sum(-1, keepdims=True))


def _attend_filled(spread_BHX, filled, size: int, k_BSX, v_BSY, visible_BS) -> Partial:
    """The first `filled` keys, `size` at a time; both at most S/2, so that every block fits."""
    B, _, Y = v_BSY.shape
    H = spread_BHX.shape[1]

    def one_block(block_idx, seen: Partial):
        block = (
            lax.dynamic_slice_in_dim(x, block_idx * size, size, axis=1)
            for x in (k_BSX, v_BSY, visible_BS)
        )
        return _merge(seen, _attend(spread_BHX, *block))

    nothing = Partial(
        jnp.zeros((B, H, Y), jnp.float32),
        jnp.full((B, H, 1), tiles.NO_SCORE, jnp.float32),
        jnp.zeros((B, H, 1), jnp.float32),
    )
    return lax.fori_loop(0, (filled + size - 1) // size, one_block, nothing)


def _merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    top_BH1 = jnp.maximum(a.top_BH1, b.top_BH1)
    a_BH1, b_BH1 = jnp.exp(a.top_BH1 - top_BH1), jnp.exp(b.top_BH1 - top_BH1)
    out_BHY = a.out_BHY * a_BH1 + b.out_BHY * b_BH1
    return Partial(out_BHY, top_BH1, a.total_BH1 * a_BH1 + b.total_BH1 * b_BH1)


def block_size(length: int, bytes_per_key: int) -> int:
    """Keys of a block: about BLOCK_BYTES, a power of two of at least 256, or all of them."""
    return min(2 ** round(math.log2(max(BLOCK_BYTES / bytes_per_key, 256))), length)


def _spread(q_BHK, num_kv_heads: int):
    """[B, H, X]: each query in the part of its key-value head, zeros elsewhere."""
    B, H, K = q_BHK.shape
    G = num_kv_heads
    own_GG = jnp.eye(G, dtype=q_BHK.dtype)
    q_BGR1K = q_BHK.reshape(B, G, H // G, 1, K)
    return (q_BGR1K * own_GG[None, :, None, :, None]).reshape(B, H, G * K)


def _own_part(out_BHY, num_kv_heads: int):
    """[B, H, V]: of each query's sums over every head's values, those of its own head."""
    B, H, Y = out_BHY.shape
    G = num_kv_heads
    out_BGRGV = out_BHY.reshape(B, G, H // G, G, Y // G)
    own = [out_BGRGV[:, head, :, head] for head in range(G)]
    return jnp.concatenate(own, axis=1)
