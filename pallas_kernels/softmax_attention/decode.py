"""One query a row against its cache: the cache is read once, as far as it is filled.

A batched product over key-value heads would copy the cache to bring the heads before the keys. Here
all heads of a key are one vector [G*K], and each query is zero outside its own head's part: G times
the arithmetic of a product that waits for memory, and no copy.
"""

import math

import jax.numpy as jnp
from jax import lax

# Bytes of cache read a step of the loop: large enough to hide a step's cost, small enough to stop
# soon after the filled part and to keep the copy of the block in cache.
BLOCK_BYTES = 2**21
NOTHING_SEEN = 1e30


def forward(q_B1HK, k_BSGK, v_BSGV, q_segment_B1, kv_segment_BS, offset_B):
    """Output in q's dtype and logsumexp [B, 1, H]; arguments as in xla.softmax_attention."""
    B, _, H, K = q_B1HK.shape
    _, S, G, V = v_BSGV.shape
    spread_BHX = _spread(q_B1HK[:, 0].astype(jnp.float32) * K**-0.5, G)
    k_BSX, v_BSY = k_BSGK.reshape(B, S, G * K), v_BSGV.reshape(B, S, G * V)
    J = block_size(S, B * G * (K + V) * 4)
    if q_segment_B1 is not None:
        offset_B = jnp.where(q_segment_B1[:, 0] == 0, -1, offset_B)

    def one_block(tile_idx, carry):
        out_BHY, top_BH1, total_BH1 = carry
        first = tile_idx * J
        start = jnp.minimum(first, S - J)

        def fetch(x_BSX):
            return lax.dynamic_slice_in_dim(x_BSX, start, J, axis=1)

        index_1J = start + jnp.arange(J, dtype=jnp.int32)[None]
        visible_BJ = (index_1J >= first) & (index_1J <= offset_B[:, None])
        if kv_segment_BS is not None:
            visible_BJ &= fetch(kv_segment_BS) == q_segment_B1.astype(kv_segment_BS.dtype)
        score_BHJ = jnp.einsum("bhx,bjx->bhj", spread_BHX, fetch(k_BSX).astype(jnp.float32))
        score_BHJ = jnp.where(visible_BJ[:, None], score_BHJ, -jnp.inf)
        new_BH1 = jnp.maximum(top_BH1, score_BHJ.max(-1, keepdims=True))
        weight_BHJ = jnp.exp(score_BHJ - new_BH1)
        decay_BH1 = jnp.exp(top_BH1 - new_BH1)
        out_BHY *= decay_BH1
        out_BHY += jnp.einsum("bhj,bjy->bhy", weight_BHJ, fetch(v_BSY).astype(jnp.float32))
        return out_BHY, new_BH1, total_BH1 * decay_BH1 + weight_BHJ.sum(-1, keepdims=True)

    carry = (
        jnp.zeros((B, H, G * V), jnp.float32),
        jnp.full((B, H, 1), -NOTHING_SEEN, jnp.float32),
        jnp.zeros((B, H, 1), jnp.float32),
    )
    if J == S:
        carry = one_block(0, carry)
    else:
        end = jnp.minimum(jnp.max(offset_B) // J + 1, -(-S // J))
        carry = lax.fori_loop(0, end, one_block, carry)
    out_BHY, top_BH1, total_BH1 = carry
    seen_BH1 = total_BH1 > 0
    total_BH1 = jnp.where(seen_BH1, total_BH1, 1.0)
    logsumexp_BH1 = jnp.where(seen_BH1, top_BH1 + jnp.log(total_BH1), NOTHING_SEEN)
    out_BHV = _own_part(out_BHY / total_BH1, G)
    return out_BHV[:, None].astype(q_B1HK.dtype), logsumexp_BH1.swapaxes(1, 2)


def block_size(length: int, bytes_per_key: int) -> int:
    """Keys of a block: BLOCK_BYTES of cache, a power of two of at least 256, or all of them."""
    size = 2 ** round(math.log2(max(BLOCK_BYTES / bytes_per_key, 256)))
    return min(size, length)


def _spread(q_BHK, num_kv_heads: int):
    """[B, H, G*K]: each query in the part of its key-value head, zeros elsewhere."""
    B, H, K = q_BHK.shape
    G = num_kv_heads
    own_GG = jnp.eye(G, dtype=q_BHK.dtype)
    q_BGR1K = q_BHK.reshape(B, G, H // G, 1, K)
    return (q_BGR1K * own_GG[None, :, None, :, None]).reshape(B, H, G * K)


def _own_part(out_BHY, num_kv_heads: int):
    """[B, H, V]: of the results with every head's values, those with the query's own."""
    B, H, Y = out_BHY.shape
    G = num_kv_heads
    out_BGRGV = out_BHY.reshape(B, G, H // G, G, Y // G)
    own = [out_BGRGV[:, head, :, head] for head in range(G)]
    return jnp.concatenate(own, axis=1)
