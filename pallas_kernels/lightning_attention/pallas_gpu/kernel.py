"""One Mosaic GPU kernel (Hopper) for lightning attention: a chunk of tokens after the other.

A block of threads owns one head of one row and 64 of its value columns, so that 64 heads of 128
fill 128 of an H100's 132 SMs; the two blocks of a head read q and k together, the second time from
L2. One warpgroup loads chunks ahead (TMA). The others compute, 64 rows of the chunk each: scores,
the read of the state, and 64 of the state's rows, which stay in float32 registers from the first
chunk to the last. Tensor cores take bfloat16: the state's copy in shared memory, the decayed
values, and the decayed scores are rounded to it, sums and decays are float32.

With `reverse` the same kernel walks from the last chunk to the first and every decay matrix is
transposed. dq, dk and dv are then this attention again with the roles (q, k, v) played by
(dout, v, k), and reversed by (v, dout, q) and (k, q, dout).
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import varying
from pallas_kernels.lightning_attention.pallas_gpu.decays import (
    Powers,
    Segments,
    SegmentTables,
    plain_decays,
    powers,
    segment_decays,
    wide,
)
from pallas_kernels.lightning_attention.pallas_gpu.plan import STAGES, TILE, Plan, Shared, scratch
from pallas_kernels.lightning_attention.pallas_gpu.versions import accumulate, load


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    initial_BHKV: jax.Array,
    segments: Segments | None,
    *,
    length: int,
    reverse: bool,
    rounds_weights: bool,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Outputs in q's dtype and the final state, for K and V of 64 or 128, bfloat16.

    Of the T tokens, a multiple of 8, `length` >= 1 count; fewer than 8 behind them are zeros.
    """
    batch, _, heads, key_dim = q_BTHK.shape
    value_dim = v_BTHV.shape[-1]
    plan = Plan(
        length, key_dim, reverse, segments is not None, rounds_weights, interpret is not None
    )
    run = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(
            jax.ShapeDtypeStruct(v_BTHV.shape, q_BTHK.dtype),
            jax.ShapeDtypeStruct(initial_BHKV.shape, jnp.float32),
        ),
        scratch_types=scratch(plan),
        # The blocks of a head are neighbours, so that they run together.
        grid=(batch, heads, value_dim // TILE),
        grid_names=("row", "head", "values"),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="lightning_attention_reverse" if reverse else "lightning_attention",
    )
    if segments is None:
        tables: tuple = powers(log_decay_H, plan)
    else:
        tables = (log_decay_H * jnp.float32(math.log2(math.e)), *segments)
    inside_shard_map = varying.of_a_kernel(lambda *arrays: run(*map(varying.forget, arrays)))
    return inside_shard_map(q_BTHK, k_BTHK, v_BTHV, initial_BHKV, *tables)


def _kernel(plan, q, k, v, initial, *refs):
    kind = SegmentTables if plan.has_segments else Powers
    count = len(kind._fields)
    tables = kind(*refs[:count])
    out, final = refs[count : count + 2]
    shared = Shared(*refs[count + 2 :])
    group = lax.axis_index("group")

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load(plan, shared, q, k, v, tables)

    @pl.when(group < plan.groups)
    def _():
        plgpu.set_max_registers(240, action="increase")
        for own in range(plan.groups):
            # One copy of the code a group: which blocks of scores it skips is then static.
            @pl.when(group == own)
            def _(own=own):
                _compute(plan, shared, own, initial, tables, out, final)


def _chunk_index(plan, step):
    return jnp.int32(plan.chunks - 1) - step if plan.reverse else step


def _load(plan, shared, q, k, v, tables):
    """The loading warpgroup: keep `STAGES` chunks in flight."""
    row, head, values = (lax.axis_index(name) for name in ("row", "head", "values"))
    if not plan.has_segments:
        plgpu.copy_gmem_to_smem(tables.diagonal_HCC.at[head], shared.diagonal, shared.tables_loaded)
        for part in range(3):
            span = pl.ds(part * plan.chunk, plan.chunk)
            powers = tables.powers_HN.at[head, span]
            plgpu.copy_gmem_to_smem(powers, shared.powers.at[span], shared.tables_loaded)

    @pl.loop(0, plan.chunks)
    def _(step):
        stage = lax.rem(step, jnp.int32(STAGES))

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(shared.consumed.at[stage])

        span = pl.ds(_chunk_index(plan, step) * plan.chunk, plan.chunk)
        loaded = shared.loaded.at[stage]
        plgpu.copy_gmem_to_smem(k.at[row, span, head], shared.k.at[stage], loaded)
        plgpu.copy_gmem_to_smem(q.at[row, span, head], shared.q.at[stage], loaded)
        columns = pl.ds(values * TILE, TILE)
        plgpu.copy_gmem_to_smem(v.at[row, span, head, columns], shared.v.at[stage], loaded)
        if plan.has_segments:
            tokens = tables.tokens_B2T.at[row, :, span]
            plgpu.copy_gmem_to_smem(tokens, shared.tokens.at[stage], loaded)

    # Nothing is left that nobody waited for.
    for step in range(max(0, plan.chunks - STAGES), plan.chunks):
        plgpu.barrier_wait(shared.consumed.at[step % STAGES])


def _compute(plan, shared, own, initial, tables, out, final):
    """A computing warpgroup: rows `own` of 64 of every chunk and of the state."""
    row, head, values = (lax.axis_index(name) for name in ("row", "head", "values"))
    here = (row, head, pl.ds(own * TILE, TILE), pl.ds(values * TILE, TILE))
    state_KV = load(initial.at[here], plgpu.Layout.WGMMA, optimized=False)
    if not plan.has_segments:
        plgpu.barrier_wait(shared.tables_loaded)

    def step(index, state_KV):
        stage = lax.rem(index, jnp.int32(STAGES))
        chunk = _chunk_index(plan, index)
        plgpu.barrier_wait(shared.loaded.at[stage])
        if plan.has_segments:
            decays = segment_decays(plan, shared.tokens.at[stage], tables, chunk, own)
        else:
            decays = plain_decays(plan, shared, chunk, own)

        _publish(plan, shared, stage, own, decays, state_KV)
        out_CV, state_KV = _products(plan, shared, stage, own, decays, state_KV)
        plgpu.barrier_arrive(shared.consumed.at[stage])
        # All have read what `_publish` wrote: it may be written again, and outputs in its place.
        plgpu.barrier_wait(shared.published_read)
        start = chunk * plan.chunk + own * TILE
        rows = pl.ds(own * TILE, TILE)
        _store(plan, shared.out.at[rows], out_CV, out, (row, start, head, values))
        return state_KV

    state_KV = lax.fori_loop(jnp.int32(0), jnp.int32(plan.chunks), step, state_KV)
    final[here] = state_KV
    plgpu.wait_smem_to_gmem(0)


def _publish(plan, shared, stage, own, decays, state_KV):
    """Put this group's rows of the decayed values and of the state where all groups read them."""
    rows = pl.ds(own * TILE, TILE)
    v_CV = load(shared.v.at[stage, rows], plgpu.Layout.WGMMA)
    if decays.is_real_C is not None:
        is_real_CV = wide(decays.is_real_C, 0)
        v_CV = jnp.where(is_real_CV, v_CV, jnp.bfloat16(0))

        @pl.when(decays.has_padding)
        def _():
            # What padding holds may be NaN, which a product with zero would keep.
            shared.v[stage, rows] = v_CV
            for block in range(plan.groups):
                k = shared.k.at[stage, rows, pl.ds(block * TILE, TILE)]
                k_CK = load(k, plgpu.Layout.WGMMA)
                k[...] = jnp.where(is_real_CV, k_CK, jnp.bfloat16(0))

    written_CV = v_CV.astype(jnp.float32) * wide(decays.write_C, 0)
    shared.written[rows] = written_CV.astype(jnp.bfloat16)
    if not plan.rounds_written:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.out[rows] = _left_out(written_CV)
    shared.state[rows] = state_KV.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.written_ready)
    plgpu.barrier_wait(shared.written_ready)


def _left_out(x):
    """What rounding float32 numbers to bfloat16 leaves out, rounded in turn."""
    return (x - x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)


def _products(plan, shared, stage, own, decays, state_KV):
    """This group's rows of the outputs, and of the state after the chunk."""
    rows = pl.ds(own * TILE, TILE)
    q = shared.q.at[stage, rows]
    acc = plgpu.ACC((TILE, TILE), jnp.float32)

    def of_written(added):
        k = shared.k.at[stage, :, rows].transpose((1, 0))
        plgpu.wgmma(added, k, shared.written)
        if not plan.rounds_written:
            plgpu.wgmma(added, k, shared.out)

    def of_state(out):
        plgpu.wgmma(out, q, shared.state)
        return out[...]

    state_KV = accumulate(of_written, decays.keep * state_KV, in_place=not plan.is_interpreted)
    out_CV = pl.run_scoped(of_state, acc)
    plgpu.barrier_arrive(shared.published_read)
    out_CV = out_CV * wide(decays.read_C, 0)
    # Here and not later: until then there are two registers where one would do, and they run out.
    state_KV, out_CV = lax.optimization_barrier((state_KV, out_CV))

    # Rows see columns up to their own; of the blocks beyond, every score is zero.
    blocks = range(own, plan.groups) if plan.reverse else range(own + 1)

    def score(accs):
        for block, scores_CC in zip(blocks, accs, strict=True):
            k = shared.k.at[stage, pl.ds(block * TILE, TILE)]
            plgpu.wgmma(scores_CC, q, k.transpose((1, 0)))
        return [scores_CC[...] for scores_CC in accs]

    # The scores take the place of these rows of q, which nobody reads any more.
    left_out = shared.out.at[rows]
    if not plan.rounds_weights:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for block, scores_CC in zip(blocks, pl.run_scoped(score, [acc for _ in blocks]), strict=True):
        scores_CC = decays.scale(scores_CC, block)
        q.at[:, pl.ds(block * TILE, TILE)][...] = scores_CC.astype(jnp.bfloat16)
        if block == own and not plan.rounds_weights:
            # Of a fast head's scores few count, and those are on the diagonal.
            left_out[...] = _left_out(scores_CC)
    plgpu.commit_smem()

    def within(out):
        for block in blocks:
            columns = pl.ds(block * TILE, TILE)
            plgpu.wgmma(out, q.at[:, columns], shared.v.at[stage, columns])
        if not plan.rounds_weights:
            plgpu.wgmma(out, left_out, shared.v.at[stage, rows])
        return out[...]

    out_CV += pl.run_scoped(within, acc)
    if decays.is_real_C is not None:
        out_CV = jnp.where(wide(decays.is_real_C, 0), out_CV, 0.0)
    return out_CV, state_KV


def _store(plan, staged, out_CV, out, place):
    row, start, head, values = place
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged[...] = out_CV.astype(staged.dtype)
    plgpu.commit_smem()

    @pl.when(start < plan.length)
    def _():
        columns = pl.ds(values * TILE, TILE)
        plgpu.copy_smem_to_gmem(staged, out.at[row, pl.ds(start, TILE), head, columns])
