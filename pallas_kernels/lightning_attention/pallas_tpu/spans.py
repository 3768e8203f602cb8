"""Where a chunk's segments begin and where its padding lies, counted before the kernel runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rows of `rows_BN8C`, all float32 as the exponents they become.
COUNT, RUN, REAL, READ, WRITE, KEEP = range(6)
# A distance over which nothing is handed on.
NEVER = -1.0


class Spans(NamedTuple):
    """Of each chunk: is it one run of real tokens, and where its runs lie if not."""

    is_plain_BN: jax.Array
    """int32. A plain chunk has no padding and no change of id, none before its first token."""
    rows_BN8C: jax.Array
    """COUNT: real tokens up to and with this one. RUN: changes of id so far. REAL: 1, 0 is padding.
    READ, WRITE, KEEP: the distances from the state before the chunk to this token, from this token
    to the state after it, and from the state before to the state after; NEVER if cut off."""


def locate(segment_ids_BT: jax.Array | None, shape_BT: tuple[int, int], chunk: int, count: int):
    """Spans of `count` chunks; what lies past the end of the row is padding."""
    batch, length = shape_BT
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((batch, length), jnp.int32)
    is_real_BT = segment_ids_BT != 0
    index_1T = jnp.arange(length, dtype=jnp.int32)[None, :]
    latest_BT = jax.lax.cummax(jnp.where(is_real_BT, index_1T, 0), axis=1)
    # The id of the last real token up to and with this one; 0 if there is none.
    current_BT = jnp.take_along_axis(segment_ids_BT, latest_BT, axis=1)
    before_BT = jnp.pad(current_BT, ((0, 0), (1, 0)))[:, :length]
    is_change_BT = (before_BT != 0) & (current_BT != before_BT)

    def in_chunks(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, count * chunk - length)))
        return x_BT.reshape(batch, count, chunk).astype(jnp.float32)

    real_BNC = in_chunks(is_real_BT)
    count_BNC = jnp.cumsum(real_BNC, axis=2)
    run_BNC = jnp.cumsum(in_chunks(is_change_BT), axis=2)
    total_BN1, runs_BN1 = count_BNC[:, :, -1:], run_BNC[:, :, -1:]
    rows = [
        count_BNC,
        run_BNC,
        real_BNC,
        jnp.where(run_BNC == 0, count_BNC, NEVER),
        jnp.where(run_BNC == runs_BN1, total_BN1 - count_BNC, NEVER),
        jnp.broadcast_to(jnp.where(runs_BN1 == 0, total_BN1, NEVER), real_BNC.shape),
    ]
    rows_BN8C = jnp.stack(rows + [jnp.zeros_like(real_BNC)] * (8 - len(rows)), axis=2)
    is_plain_BN1 = (total_BN1 == chunk) & (runs_BN1 == 0)
    return Spans(is_plain_BN1[:, :, 0].astype(jnp.int32), rows_BN8C)
