"""The frame of both passes: a grid of rows, blocks of heads and blocks of tokens, state in VMEM."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.pallas_tpu import decays, layout, spans

# The default limit is 16 MiB, of 64 and more; only v4 has no more than that, and stops there.
_VMEM_LIMIT = 48 * 2**20


class Plan(NamedTuple):
    """Sizes of one call; all static."""

    layout: layout.Layout
    lengths: tuple[int, int, int]
    """B, T, H."""
    lanes: int
    """The larger of K and V."""
    dtype: Any
    """Of the operands, bfloat16 or float32."""
    chunk: int
    block_chunks: int
    is_reversed: bool
    has_spans: bool
    """Whether any chunk may hold padding or a change of id, as the last does if T ends within."""

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.lengths[1], self.chunk * self.block_chunks)

    def token_block(self, t):
        """The block of tokens of step t."""
        return self.blocks - 1 - t if self.is_reversed else t


class Chunk(NamedTuple):
    """What a pass needs to know about the chunk it is at."""

    start: Any
    """Of the chunk in its block, in tokens."""
    decays: decays.Decays
    """References to those of all heads of the block."""
    real_words: jax.Array | None
    """None if every token of every chunk is real."""

    def mask(self, x_CK):
        """Zero where there is padding, whatever it holds; NaN times zero would not be."""
        if self.real_words is None:
            return x_CK
        words = pltpu.bitcast(x_CK, jnp.uint32)
        return pltpu.bitcast(words & self.real_words[:, : words.shape[1]], x_CK.dtype)


def _kernel(plan: Plan, step: Callable[..., None], *refs):
    """One grid step: all chunks of a block, in order, for all heads of a block of heads."""
    left = list(refs)
    if plan.has_spans:
        *left, are_plain_ref, real_words_ref = left
        is_plain_ref, log_decay_ref, rows_ref, *left = left
    else:
        log_decay_ref, *left = left
    initial_ref, *arrays, final_ref = left[:-4]
    tables = decays.Decays(*left[-4:])
    # The final state's block is the same at every step of t, so it stays in VMEM until the last.
    state_ref = final_ref.at[0]
    row, head_block, t = (pl.program_id(dim) for dim in range(3))

    def store(distances):
        first = head_block * plan.layout.heads
        decays.store(distances, tables, lambda h: log_decay_ref[first + h])

    @pl.when(t == 0)
    def _():
        state_ref[...] = initial_ref[0]
        if plan.has_spans:
            are_plain_ref[0] = 0
        else:
            store(decays.plain(plan))

    def locate(c):
        # All plain chunks have the same decays; those of any other are made for it.
        is_plain = is_plain_ref[row, plan.token_block(t) * plan.block_chunks + c]

        @pl.when((is_plain & are_plain_ref[0]) == 0)
        def _():
            rows_8C = rows_ref[0, c]
            store(decays.located(plan, rows_8C))
            real_words_ref[...] = decays.real_words(plan, rows_8C)

        are_plain_ref[0] = is_plain

    def body(i, _):
        c = plan.block_chunks - 1 - i if plan.is_reversed else i
        if plan.has_spans:
            locate(c)
        real_words = real_words_ref[...] if plan.has_spans else None
        start = pl.multiple_of(c * plan.chunk, plan.chunk)
        step(plan, Chunk(start, tables, real_words), state_ref, *arrays)

    # Two chunks in a row of instructions: one fills its end with the other's beginning.
    unroll = 2 if plan.block_chunks % 2 == 0 else 1
    jax.lax.fori_loop(0, plan.block_chunks, body, None, unroll=unroll)


def call(
    plan: Plan,
    step: Callable[..., None],
    arrays_BTHX: Sequence[jax.Array],
    outputs: Sequence[jax.Array],
    log_decay_H: jax.Array,
    state_BHVK: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    name: str,
    interpret: Any,
) -> list[jax.Array]:
    """Run `step(plan, chunk, state_ref, *array_refs, *output_refs)` over every chunk.

    The results are like `outputs`, then the state after the last chunk, transposed as the one
    before the first: V before K, so that a product with it and one with k become one.
    """
    B, T, H = plan.lengths
    heads, tokens = plan.layout.heads, plan.chunk * plan.block_chunks

    def spec(x_BTHX):
        return plan.layout.spec(tokens, x_BTHX.shape[3], plan.token_block)

    state_spec = functools.partial(
        pl.BlockSpec, (1, heads, *state_BHVK.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0)
    )
    scalars, rows, rows_specs = [log_decay_H], [], []
    scratch = decays.scratch(heads, plan.chunk, plan.lanes)
    if plan.has_spans:
        found = spans.locate(segment_ids_BT, (B, T), plan.chunk, plan.blocks * plan.block_chunks)
        scalars, rows = [found.is_plain_BN, log_decay_H], [plan.layout.in_rows(found.rows_BN8C)]
        block = (1, plan.block_chunks, 8, plan.chunk)
        rows_specs = [pl.BlockSpec(block, lambda b, h, t, *_: (b, plan.token_block(t), 0, 0))]
        words = plan.chunk * jnp.dtype(plan.dtype).itemsize // 4
        scratch += [pltpu.SMEM((1,), jnp.int32), pltpu.VMEM((words, plan.lanes), jnp.uint32)]
    shaped = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(state_BHVK).manual_axis_type
    )
    initial_spec = state_spec(pipeline_mode=pl.Buffered(1))
    *results, final_BHVK = pl.pallas_call(
        functools.partial(_kernel, plan, step),
        out_shape=[
            *(shaped(plan.layout.shape(x), x.dtype) for x in outputs),
            shaped(state_BHVK.shape, jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H // heads, plan.blocks),
            in_specs=[*rows_specs, initial_spec, *map(spec, arrays_BTHX)],
            out_specs=[*map(spec, outputs), state_spec()],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        name=name,
        interpret=interpret,
    )(*scalars, *rows, state_BHVK, *(x.reshape(plan.layout.shape(x)) for x in arrays_BTHX))
    return [*(x.reshape(y.shape) for x, y in zip(results, outputs, strict=True)), final_BHVK]
