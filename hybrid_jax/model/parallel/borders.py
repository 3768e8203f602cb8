"""What is left of a lightning state on its way from one shard border to another.

Every shard works this out for all of them from the segment ids of the whole row. M stands for the
borders, from the row's beginning to its end: one more than there are shards. b is B, or 1 where
all rows are alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Borders(NamedTuple):
    """Counts from the beginning of the row to each border."""

    tokens_bM: jax.Array
    """Real tokens."""
    cuts_bM: jax.Array
    """Shards that hand nothing on: a document begins there, at the first real token or later."""
    is_continued_bN: jax.Array
    """Whether the first real token of the shard continues what came before. Nothing depends on it
    where there is none."""

    def decay(self, log_decay_H: jax.Array, start, stop) -> jax.Array:
        """`[X, b, H]`: what arrives at border `stop` of a state at `start`; one of them may be [X].

        Zero where a document begins in between, and where `start` lies behind `stop`.
        """
        start, stop = jnp.broadcast_arrays(jnp.atleast_1d(start), jnp.atleast_1d(stop))
        tokens_bX, cuts_bX = (
            jnp.take(x_bM, stop, axis=1) - jnp.take(x_bM, start, axis=1)
            for x_bM in (self.tokens_bM, self.cuts_bM)
        )
        is_open_bX = (start <= stop)[None, :] & (cuts_bX == 0)
        exponent_XbH = (
            tokens_bX.T[:, :, None].astype(log_decay_H.dtype) * log_decay_H[None, None, :]
        )
        # Masked before exp: a distance behind is a positive exponent.
        return jnp.exp(jnp.where(is_open_bX.T[:, :, None], exponent_XbH, -jnp.inf))


def without_segments(num_shards: int, length: int) -> Borders:
    """Of rows that are one document of real tokens."""
    tokens_1M = length * jnp.arange(num_shards + 1, dtype=jnp.int32)[None, :]
    is_continued_1N = jnp.ones((1, num_shards), bool)
    return Borders(tokens_1M, jnp.zeros_like(tokens_1M), is_continued_1N)


def locate(segment_ids_BNT: jax.Array) -> Borders:
    """From the ids of all shards; 0 is padding, and equal ids on both sides of it continue."""
    is_real_BNT = segment_ids_BNT != 0
    index_11T = jnp.arange(segment_ids_BNT.shape[2], dtype=jnp.int32)[None, None, :]
    first_BN1 = jnp.min(jnp.where(is_real_BNT, index_11T, index_11T.size), axis=2, keepdims=True)
    last_BN1 = jnp.max(jnp.where(is_real_BNT, index_11T, -1), axis=2, keepdims=True)
    # 0 if the shard has no real token.
    first_id_BN, last_id_BN = (
        jnp.where(index_11T == at_BN1, segment_ids_BNT, 0).sum(axis=2)
        for at_BN1 in (first_BN1, last_BN1)
    )
    before_id_BN = _latest_before(last_id_BN)
    open_id_BN = jnp.where(before_id_BN != 0, before_id_BN, first_id_BN)
    is_cut_BN = (is_real_BNT & (segment_ids_BNT != open_id_BN[:, :, None])).any(axis=2)

    def up_to(count_BN):
        return jnp.pad(jnp.cumsum(count_BN, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))

    return Borders(
        up_to(is_real_BNT.sum(axis=2)), up_to(is_cut_BN), is_continued_bN=first_id_BN == open_id_BN
    )


def _latest_before(id_BN: jax.Array) -> jax.Array:
    """For each shard the last id that is not 0 of those before it; 0 if there is none."""
    index_1N = jnp.arange(id_BN.shape[1], dtype=jnp.int32)[None, :]
    latest_BN = jax.lax.cummax(jnp.where(id_BN != 0, index_1N, 0), axis=1)
    current_BN = jnp.take_along_axis(id_BN, latest_BN, axis=1)
    return jnp.pad(current_BN, ((0, 0), (1, 0)))[:, :-1]
