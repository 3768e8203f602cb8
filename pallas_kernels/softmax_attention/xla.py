"""Blockwise attention in plain XLA: online softmax forward, recomputed scores backward.

Neither direction holds more of the T x S scores than one tile for every head of a few rows. Tiles
above the diagonal, past the filled part of a cache or between segments are skipped by trip count.
The heads of some rows go through a tile together, query heads of a group as rows of one matmul, so
that every product is a batched matmul with its operands in the plain order: XLA's CPU backend runs
those at the machine's rate, and products that contract the rows of both operands at a third of it.
Letters: see tiles.py. Sizes were measured on 2 cores with 1 MiB of L2 each and 32 MiB of L3.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.softmax_attention import decode, tiles

# Scores of a tile over all heads of the rows that go together; the backward holds three such arrays
# and the tiles of more operands, and is a sixth slower at twice this size.
FORWARD_SCORES, BACKWARD_SCORES = 2**20, 2**19


def tile_size(batch: int, heads: int, length: int) -> int:
    """Tokens of a tile, from 128 to 512: two million scores at most over all rows and heads.

    Below 512 rows by 256 keys XLA leaves a product to one thread; 512 tokens pay only where the
    half-empty tiles on the diagonal are few.
    """
    largest = 512 if length >= 2048 else 256
    size = 128
    while size < largest and batch * heads * (2 * size) ** 2 <= 2**21:
        size *= 2
    return min(size, length)


def _by_rows(function, scores: int, *args):
    """The function over groups of rows, one after the other, where all rows would be too many."""
    (batch, T, heads, _), (_, S, _, _) = args[0].shape, args[1].shape
    row_scores = heads * min(T, 256) * min(S, 256)
    divisors = (group for group in range(1, batch + 1) if batch % group == 0)
    group = max(g for g in divisors if g == 1 or g * row_scores <= scores)
    if group == batch:
        return function(*args)
    groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), args)
    results = lax.map(lambda args: function(*args), groups)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def forward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *, causal=True):
    """Output in q's dtype, and the logsumexp [B, T, H] of each query's scores."""
    offset_B = _offset(q_BTHK, k_BSGK, offset_B, causal)
    args = (q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B)
    if q_BTHK.shape[1] == 1:
        return decode.forward(*args)
    return _by_rows(_forward, FORWARD_SCORES, *args)


def backward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *results, causal=True):
    """Gradients of q, k and v; `results` are the forward's and the cotangent of its output."""
    offset_B = _offset(q_BTHK, k_BSGK, offset_B, causal)
    args = (q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B)
    gradients = _by_rows(_backward, BACKWARD_SCORES, *args, *results)
    return tuple(d_x.astype(x.dtype) for d_x, x in zip(gradients, args))


def _offset(q_BTHK, k_BSGK, offset_B, causal: bool):
    """Where the queries stand: behind every key where order hides none."""
    if offset_B is None:
        return jnp.full(q_BTHK.shape[0], 0 if causal else k_BSGK.shape[1], jnp.int32)
    return offset_B.astype(jnp.int32)


def _forward(q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B):
    """Output in q's dtype, and the logsumexp of each query's scores."""
    B, T, H, K = q_BTHK.shape
    _, S, G, V = v_BSGV.shape
    C, J = tile_size(B, H, T), tile_size(B, H, S)
    q_NPMK = tiles.cut(q_BTHK, G, C) * K**-0.5
    query = tiles.query_side(offset_B, q_segment_BT, T, C)
    key = tiles.key_side(B, kv_segment_BS, S, J)
    clear_NU = tiles.clear(query, key)
    first_N, end_N = tiles.trips(tiles.touching(query, key))
    _, P, M, _ = q_NPMK.shape

    def fetch(x_BSGK, tile_idx):
        # Read where it lies: a cache is far larger than the part that is filled. The last tile may
        # start early to stay inside; the keys it repeats are masked by their tile's indices.
        start = jnp.minimum(tile_idx * J, S - J)
        x_BJGK = lax.dynamic_slice_in_dim(x_BSGK, start, J, axis=1)
        return x_BJGK.swapaxes(1, 2).reshape(P, J, -1).astype(jnp.float32)

    def one_query_tile(_, inputs):
        q_PMK, query_tile, clear_U, first, end = inputs

        def one_key_tile(tile_idx, carry, masked):
            out_PMV, top_PM1, total_PM1 = carry
            score_PMJ = jnp.einsum("pmk,pjk->pmj", q_PMK, fetch(k_BSGK, tile_idx))
            if masked:
                key_tile = tiles.key_tile(tile_idx, kv_segment_BS, S, J)
                score_PMJ = tiles.mask(score_PMJ, tiles.visible(query_tile, key_tile))
            new_PM1 = jnp.maximum(top_PM1, score_PMJ.max(-1, keepdims=True))
            weight_PMJ = jnp.exp(score_PMJ - new_PM1)
            decay_PM1 = jnp.exp(top_PM1 - new_PM1)
            out_PMV *= decay_PM1
            out_PMV += jnp.einsum("pmj,pjv->pmv", weight_PMJ, fetch(v_BSGV, tile_idx))
            total_PM1 = total_PM1 * decay_PM1 + weight_PMJ.sum(-1, keepdims=True)
            return out_PMV, new_PM1, total_PM1

        def clear_or_masked(tile_idx, carry):
            # The maximum is a pass of its own, and so is the mask before it.
            branches = (functools.partial(one_key_tile, masked=m) for m in (False, True))
            return lax.cond(clear_U[tile_idx], *branches, tile_idx, carry)

        start = (
            jnp.zeros((P, M, V), jnp.float32),
            jnp.full((P, M, 1), tiles.NO_SCORE, jnp.float32),
            jnp.zeros((P, M, 1), jnp.float32),
        )
        out_PMV, top_PM1, total_PM1 = lax.fori_loop(first, end, clear_or_masked, start)
        total_PM1 = jnp.where(total_PM1 > 0, total_PM1, 1.0)
        return None, (out_PMV / total_PM1, top_PM1 + jnp.log(total_PM1))

    inputs = (q_NPMK, query, clear_NU, first_N, end_N)
    _, (out_NPMV, logsumexp_NPM1) = lax.scan(one_query_tile, None, inputs)
    join = functools.partial(tiles.join, batch=B, num_kv_heads=G, size=C, length=T)
    return join(out_NPMV).astype(q_BTHK.dtype), join(logsumexp_NPM1)[..., 0]


def _backward(*args):
    """Gradients of q, k and v in float32: scores again tile by tile, five matmuls each."""
    q_BTHK, k_BSGK, v_BSGV, q_segment_BT, kv_segment_BS, offset_B, *results = args
    out_BTHV, logsumexp_BTH, d_out_BTHV = results
    B, T, H, K = q_BTHK.shape
    _, S, G, V = v_BSGV.shape
    C, J = tile_size(B, H, T), tile_size(B, H, S)
    d_out_BTHV = d_out_BTHV.astype(jnp.float32)
    delta_BTH = jnp.sum(d_out_BTHV * out_BTHV.astype(jnp.float32), axis=-1)
    k_UPJK, v_UPJV = tiles.cut(k_BSGK, G, J), tiles.cut(v_BSGV, G, J)
    query = tiles.query_side(offset_B, q_segment_BT, T, C)
    key = tiles.key_side(B, kv_segment_BS, S, J)
    first_N, end_N = tiles.trips(tiles.touching(query, key))

    def one_query_tile(carry, inputs):
        q_PMK, do_PMV, logsumexp_PM1, delta_PM1, query_tile, first, end = inputs
        # Transposed here, once: XLA would fold the transpose into the products below, and those it
        # then calculates three times slower.
        transposed = q_PMK.swapaxes(1, 2), do_PMV.swapaxes(1, 2)
        q_PKM, do_PVM = lax.optimization_barrier(transposed)

        def one_key_tile(tile_idx, carry):
            dk_UPKJ, dv_UPVJ, dq_PMK = carry
            k_PJK, v_PJV, key_tile = _at((k_UPJK, v_UPJV, key), tile_idx)
            score_PMJ = jnp.einsum("pmk,pjk->pmj", q_PMK, k_PJK)
            score_PMJ = tiles.mask(score_PMJ, tiles.visible(query_tile, key_tile))
            weight_PMJ = jnp.exp(score_PMJ - logsumexp_PM1)
            dv_PVJ = jnp.einsum("pvm,pmj->pvj", do_PVM, weight_PMJ)
            d_weight_PMJ = jnp.einsum("pmv,pjv->pmj", do_PMV, v_PJV)
            d_score_PMJ = weight_PMJ * (d_weight_PMJ - delta_PM1)
            dk_PKJ = jnp.einsum("pkm,pmj->pkj", q_PKM, d_score_PMJ)
            dq_PMK += jnp.einsum("pmj,pjk->pmk", d_score_PMJ, k_PJK)
            return _add_at(dk_UPKJ, tile_idx, dk_PKJ), _add_at(dv_UPVJ, tile_idx, dv_PVJ), dq_PMK

        carry = (*carry, jnp.zeros_like(q_PMK))
        *carry, dq_PMK = lax.fori_loop(first, end, one_key_tile, carry)
        return tuple(carry), dq_PMK

    inputs = (
        tiles.cut(q_BTHK, G, C) * K**-0.5,
        tiles.cut(d_out_BTHV, G, C),
        tiles.cut(logsumexp_BTH[..., None], G, C),
        tiles.cut(delta_BTH[..., None], G, C),
        query,
        first_N,
        end_N,
    )
    start = jnp.zeros_like(k_UPJK.swapaxes(2, 3)), jnp.zeros_like(v_UPJV.swapaxes(2, 3))
    (dk_UPKJ, dv_UPVJ), dq_NPMK = lax.scan(one_query_tile, start, inputs)
    join_keys = functools.partial(tiles.join, batch=B, num_kv_heads=G, size=J, length=S)
    dq_BTHK = tiles.join(dq_NPMK, B, G, C, T) * K**-0.5
    return dq_BTHK, join_keys(dk_UPKJ.swapaxes(2, 3)), join_keys(dv_UPVJ.swapaxes(2, 3))


def _at(tree, index):
    """Entry `index` of the first dim of every leaf."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _add_at(total, index, x):
    """`total` with x added to its entry `index`, in place inside a loop."""
    return lax.dynamic_update_index_in_dim(total, _at(total, index) + x, index, axis=0)
