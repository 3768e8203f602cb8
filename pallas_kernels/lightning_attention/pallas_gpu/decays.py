"""The decays of a chunk in the kernel: from tables, or with segments from counts of tokens."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning_attention.pallas_gpu.plan import TILE
from pallas_kernels.lightning_attention.pallas_gpu.versions import load

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Segments(NamedTuple):
    """Where a chunk's tokens stand, as float32 so that nothing is converted in the kernel.

    The tables are padded to whole chunks, with tokens that are not real.
    """

    tokens_B2T: jax.Array
    """Real tokens of the chunk up to and with this one; changes of segment, or -1 for padding."""
    chunks_B2N: jax.Array
    """Both at the chunk's last token, padding or not."""


class SegmentTables(NamedTuple):
    """What the kernel takes in place of `Powers` where there are segments."""

    log2_decay_H: Any
    tokens_B2T: Any
    chunks_B2N: Any


class Powers(NamedTuple):
    """Decays of a chunk without segments: input-independent, so computed once, outside."""

    powers_HN: jax.Array
    """decay^(i+1) of token i, then decay^(C-1-i), which stays 1 from the last token on; 3 C."""
    diagonal_HCC: jax.Array
    """decay^(i-j) of the scores on the diagonal, where i is not after j 0; `reverse` transposes."""


def powers(log_decay_H, plan) -> Powers:
    index_C = jnp.arange(plan.chunk)
    to_end = jnp.maximum(plan.chunk - 1 - jnp.arange(2 * plan.chunk), 0)
    counts_N = jnp.concatenate([index_C + 1, to_end]).astype(jnp.float32)
    distance_CC = index_C[:TILE, None] - index_C[None, :TILE]
    distance_CC = -distance_CC if plan.reverse else distance_CC
    exponent_HCC = log_decay_H[:, None, None] * distance_CC.astype(jnp.float32)[None]
    return Powers(
        jnp.exp(log_decay_H[:, None] * counts_N[None]),
        jnp.exp(jnp.where(distance_CC[None] >= 0, exponent_HCC, -jnp.inf)),
    )


class Decays(NamedTuple):
    """What is left of one token's writing at another token of the chunk; `Decays` of xla.py."""

    read_C: Any
    write_C: Any
    keep: Any
    scale: Any  # (scores, block of columns) -> decayed scores
    is_real_C: Any  # or None if all are
    has_padding: Any


def wide(x_C, dim):
    return lax.broadcast_in_dim(x_C, (TILE, TILE), [dim])


def plain_decays(plan, shared, chunk, own) -> Decays:
    # The last chunk may be shorter: its decays to the end begin further on in the table. Rows past
    # the end hold zeros; their decays need only be finite.
    size = jnp.minimum(jnp.int32(plan.chunk), plan.length - chunk * plan.chunk)

    def from_start(block, layout):
        return load(shared.powers.at[pl.ds(block * TILE, TILE)], layout)

    def to_end(block, layout, missing=0):
        start = plan.chunk + block * TILE + missing
        return load(shared.powers.at[pl.ds(start, TILE)], layout)

    read_C, write_C = from_start(own, _ROWS), to_end(own, _ROWS, plan.chunk - size)
    if plan.reverse:
        read_C, write_C = write_C, read_C

    def scale(scores_CC, block):
        if block == own:
            return scores_CC * load(shared.diagonal, plgpu.Layout.WGMMA)
        # Off the diagonal, a power for the row and one for the column, neither above 1. These two
        # make blocks next to each other, and more than two blocks there are not.
        last = plan.groups - 1
        row_C, column_C = from_start(0, _ROWS), to_end(last, _COLUMNS)
        if plan.reverse:
            row_C, column_C = to_end(last, _ROWS), from_start(0, _COLUMNS)
        return scores_CC * wide(row_C, 0) * wide(column_C, 1)

    return Decays(read_C, write_C, shared.powers[size - 1], scale, None, None)


def segment_decays(plan, tokens, tables, chunk, own) -> Decays:
    row, log2_decay = lax.axis_index("row"), tables.log2_decay_H[lax.axis_index("head")]
    total, last_run = (tables.chunks_B2N[row, n, chunk] for n in range(2))

    def both(block, layout):
        return (load(tokens.at[n, pl.ds(block * TILE, TILE)], layout) for n in range(2))

    def power(count, is_open):
        return jnp.where(is_open, jnp.exp2(log2_decay * count), 0.0)

    count_C, run_C = both(own, _ROWS)
    read_C, write_C = power(count_C, run_C == 0.0), power(total - count_C, run_C == last_run)
    if plan.reverse:
        read_C, write_C = write_C, read_C

    def scale(scores_CC, block):
        count_D, run_D = both(block, _COLUMNS)
        distance_CC = wide(count_C, 0) - wide(count_D, 1)
        distance_CC = -distance_CC if plan.reverse else distance_CC
        # Padding has no run in common with a real token, and real tokens are counted in order.
        is_open_CC = (wide(run_C, 0) == wide(run_D, 1)) & (distance_CC >= 0.0)
        # A selection, not a product: scores of padding may be NaN, and masked powers infinite.
        return jnp.where(is_open_CC, scores_CC * jnp.exp2(log2_decay * distance_CC), 0.0)

    return Decays(
        read_C, write_C, power(total, last_run == 0.0), scale, run_C >= 0.0, total < plan.chunk
    )
