"""Tiles of the score matrix: how they are cut, which of them hold anything, what each may see.

Local letters beside the house alphabet: P = B*G pairs of a row and a key-value head, R = H/G query
heads that share it, M = R*C query rows of a tile, J = keys of a tile, U = key tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Marks what no query may see and what can see no key.
PAST_ALL = 2**31 - 1
BEFORE_ALL = -1
# Below every score and finite: exp of a masked score (-inf) less this is 0, not NaN, so a query
# that sees nothing has weights and gradients of 0.
NO_SCORE = -1e30


class Side(NamedTuple):
    """Where the queries, or the keys, stand: index in the row and segment id, cut into tiles.

    Padding of the last tile has an index, BEFORE_ALL or PAST_ALL, that sees and shows nothing.
    """

    index_NBC: jax.Array
    segment_NBC: jax.Array | None


def cut(x_BTHK, num_kv_heads: int, size: int):
    """[B, T, H, K] to tiles [N, P, M, K] of `size` tokens, zeros after T; float32."""
    B, T, H, K = x_BTHK.shape
    G, R, N = num_kv_heads, H // num_kv_heads, -(-T // size)
    x_BTHK = jnp.pad(x_BTHK, ((0, 0), (0, N * size - T), (0, 0), (0, 0)))
    x_BNCGRK = x_BTHK.reshape(B, N, size, G, R, K)
    x_NBGRCK = x_BNCGRK.transpose(1, 0, 3, 4, 2, 5)
    return x_NBGRCK.reshape(N, B * G, R * size, K).astype(jnp.float32)


def join(x_NPMK, batch: int, num_kv_heads: int, size: int, length: int):
    """The inverse of cut: [B, T, H, K], without the zeros."""
    N, P, M, K = x_NPMK.shape
    R = M // size
    x_NBGRCK = x_NPMK.reshape(N, batch, num_kv_heads, R, size, K)
    x_BNCGRK = x_NBGRCK.transpose(1, 0, 4, 2, 3, 5)
    return x_BNCGRK.reshape(batch, N * size, num_kv_heads * R, K)[:, :length]


def query_side(offset_B, segment_BT, length: int, size: int) -> Side:
    """Queries at offset_B + 0, 1, ...; those of segment 0 see nothing."""
    index_BT = offset_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    if segment_BT is not None:
        index_BT = jnp.where(segment_BT == 0, BEFORE_ALL, index_BT)
    return _side(index_BT, segment_BT, size, BEFORE_ALL)


def key_side(batch: int, segment_BS, length: int, size: int) -> Side:
    """Keys at 0, 1, ...; those of segment 0 are seen by nobody, as no query has that id."""
    index_1S = jnp.arange(length, dtype=jnp.int32)[None]
    return _side(jnp.broadcast_to(index_1S, (batch, length)), segment_BS, size, PAST_ALL)


def key_tile(tile_idx, segment_BS, length: int, size: int) -> Side:
    """One key tile of the array as it lies: the last one starts early if it would not fit.

    The keys it then shares with the tile before it are shown to nobody a second time.
    """
    first = tile_idx * size
    start = jnp.minimum(first, length - size)
    index_J = start + jnp.arange(size, dtype=jnp.int32)
    index_1J = jnp.where(index_J < first, PAST_ALL, index_J)[None]
    if segment_BS is None:
        return Side(index_1J, None)
    segment_BJ = jax.lax.dynamic_slice_in_dim(segment_BS, start, size, axis=1)
    return Side(index_1J, segment_BJ.astype(jnp.int32))


def _side(index_BT, segment_BT, size, padding) -> Side:
    batch, length = index_BT.shape
    count = -(-length // size)

    def tiles(x_BT, value):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, count * size - length)), constant_values=value)
        return x_BT.reshape(batch, count, size).swapaxes(0, 1)

    segment_NBC = None if segment_BT is None else tiles(segment_BT.astype(jnp.int32), 0)
    return Side(tiles(index_BT, padding), segment_NBC)


def visible(query: Side, key: Side):
    """Which key of one tile each query of one tile may see, [B, C, J]; sides without N."""
    seen_BCJ = query.index_NBC[:, :, None] >= key.index_NBC[:, None, :]
    if query.segment_NBC is None or key.segment_NBC is None:
        return seen_BCJ
    return seen_BCJ & (query.segment_NBC[:, :, None] == key.segment_NBC[:, None, :])


def mask(score_PMJ, visible_BCJ):
    """Scores with -inf where a query may not see a key."""
    P, M, J = score_PMJ.shape
    B, C, _ = visible_BCJ.shape
    visible_B11CJ = visible_BCJ[:, None, None]
    score_BGRCJ = score_PMJ.reshape(B, P // B, M // C, C, J)
    return jnp.where(visible_B11CJ, score_BGRCJ, -jnp.inf).reshape(P, M, J)


def touching(query: Side, key: Side):
    """Which pairs of tiles may hold a visible score, [N, U]; never too few."""
    last_NB, first_UB = query.index_NBC.max(-1), key.index_NBC.min(-1)
    touch_NUB = last_NB[:, None] >= first_UB[None, :]
    if query.segment_NBC is not None:
        low_NB, high_NB = _segment_range(query.segment_NBC)
        low_UB, high_UB = _segment_range(key.segment_NBC)
        touch_NUB &= low_NB[:, None] <= high_UB[None, :]
        touch_NUB &= low_UB[None, :] <= high_NB[:, None]
    return touch_NUB.any(-1)


def clear(query: Side, key: Side):
    """Which pairs of tiles are wholly visible and need no mask, [N, U]; never too many."""
    first_NB, last_UB = query.index_NBC.min(-1), key.index_NBC.max(-1)
    clear_NUB = first_NB[:, None] >= last_UB[None, :]
    if query.segment_NBC is not None and key.segment_NBC is not None:
        low_NB, high_UB = query.segment_NBC.min(-1), key.segment_NBC.max(-1)
        clear_NUB &= (low_NB == query.segment_NBC.max(-1))[:, None]
        clear_NUB &= (key.segment_NBC.min(-1) == high_UB)[None, :]
        clear_NUB &= low_NB[:, None] == high_UB[None, :]
    return clear_NUB.all(-1)


def _segment_range(segment_NBC):
    """Smallest and largest id of a tile other than 0."""
    low_NB = jnp.where(segment_NBC == 0, PAST_ALL, segment_NBC).min(-1)
    return low_NB, segment_NBC.max(-1)


def trips(touch_NU):
    """First and one past the last touching tile of each row, both [N]; equal if there is none."""
    U = touch_NU.shape[1]
    first_N = jnp.argmax(touch_NU, axis=1).astype(jnp.int32)
    end_N = U - jnp.argmax(touch_NU[:, ::-1], axis=1).astype(jnp.int32)
    return first_N, jnp.where(touch_NU.any(1), end_N, first_N)
