"""What is left of one token's writing at another token of the chunk, in the kernel's memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.pallas_tpu import spans


class Decays(NamedTuple):
    """Distances in tokens, or a head's decays over them; float32, or references to such.

    X is the larger of K and V: all lanes of a row are equal, so that no product broadcasts.
    """

    within_CC: jax.Array
    """Between tokens; the reading one is in the rows, or in the columns if reversed."""
    read_CX: jax.Array
    """From the state before the chunk to each token."""
    write_CX: jax.Array
    """From each token to the state after the chunk."""
    keep_1X: jax.Array
    """From the state before the chunk to the one after it."""


def scratch(heads: int, chunk: int, lanes: int) -> list:
    """Memory for the decays of every head of a block."""
    # In the order of Decays.
    shapes = (chunk, chunk), (chunk, lanes), (chunk, lanes), (1, lanes)
    return [pltpu.VMEM((heads, *shape), jnp.float32) for shape in shapes]


def store(distances: Decays, refs: Decays, log_decay_of) -> None:
    """Every head's exp(distance * log_decay), zero where nothing is handed on.

    Exponents are masked before exp: unmasked ones of a fast head overflow.
    """

    def head(h, _):
        log_decay = log_decay_of(h)
        for ref, distance in zip(refs, distances, strict=True):
            exponent = jnp.where(distance >= 0, distance * log_decay, -jnp.inf)
            ref[pl.ds(h, 1)] = jnp.exp(exponent)[None]

    jax.lax.fori_loop(0, refs.keep_1X.shape[0], head, None)


def _tokens(plan, lanes: int, dim: int):
    """`[C, lanes]`: the token's place in its chunk, down the rows or across the lanes."""
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.chunk, lanes), dim)
    return plan.layout.token_of_row(row).astype(jnp.float32)


def plain(plan) -> Decays:
    """Distances in a chunk that is one run of real tokens."""
    chunk, lanes, is_reversed = plan.chunk, plan.lanes, plan.is_reversed
    row_CC, column_CC = _tokens(plan, chunk, 0), _tokens(plan, chunk, 1)
    row_CX = _tokens(plan, lanes, 0)
    return Decays(
        column_CC - row_CC if is_reversed else row_CC - column_CC,
        row_CX + 1.0,
        chunk - 1.0 - row_CX,
        jnp.full((1, lanes), float(chunk), jnp.float32),
    )


def located(plan, rows_8C: jax.Array) -> Decays:
    """Distances in any chunk, from its rows of `Spans`, put in the order of the layout."""
    chunk, lanes = plan.chunk, plan.lanes
    columns_C8 = rows_8C.T
    row = lambda i: rows_8C[i : i + 1]
    column = lambda i: columns_C8[:, i : i + 1]
    down_CC, across_CC = _tokens(plan, chunk, 0), _tokens(plan, chunk, 1)
    distance_CC = column(spans.COUNT) - row(spans.COUNT)
    is_past_CC = down_CC >= across_CC
    if plan.is_reversed:
        distance_CC, is_past_CC = -distance_CC, down_CC <= across_CC
    is_open_CC = is_past_CC & (column(spans.RUN) == row(spans.RUN))
    return Decays(
        jnp.where(is_open_CC, distance_CC, spans.NEVER),
        jnp.broadcast_to(column(spans.READ), (chunk, lanes)),
        jnp.broadcast_to(column(spans.WRITE), (chunk, lanes)),
        jnp.broadcast_to(row(spans.KEEP)[:, :1], (1, lanes)),
    )


def real_words(plan, rows_8C: jax.Array) -> jax.Array:
    """All bits set where a token is real, in 32-bit words of an array `[C, X]` of operands."""
    is_real_C1 = rows_8C.T[:, spans.REAL : spans.REAL + 1]
    is_real_CX = jnp.broadcast_to(is_real_C1, (plan.chunk, plan.lanes))
    ones_CX = jnp.where(is_real_CX > 0, -1, 0).astype(jnp.int32)
    if plan.dtype == jnp.bfloat16:
        return pltpu.bitcast(ones_CX.astype(jnp.int16), jnp.uint32)
    return pltpu.bitcast(ones_CX, jnp.uint32)
