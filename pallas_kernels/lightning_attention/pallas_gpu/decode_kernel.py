"""Single tokens on a GPU: the state is read once, stepped in float32 registers, and written once.

That is all the time it takes: a token does half an operation a byte of state. A block of threads
owns 32 value columns of one head of one row, 16 KiB, small enough that a dozen of them share an SM
and keep its memory busy, and that one row of 64 heads fills the chip.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import varying
from pallas_kernels.lightning_attention.pallas_gpu.versions import load, store, swizzled_tiles

# A row of a tile is then as long as the widest swizzle.
COLUMNS = 32

_SWIZZLED = swizzled_tiles(COLUMNS)


def steps(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    state_BHKV: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """T steps of every row, one after the other: outputs in q's dtype and the last states.

    K must be a multiple of 64 and V of 32; states are float32, q, k and v float32 or bfloat16.
    """
    out = jax.ShapeDtypeStruct(v_BTHV.shape, q_BTHK.dtype)
    new = jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32)

    def body(q, k, v, decay, state, out, new, *scratch):
        row = lax.axis_index("row")
        _step_block(q, k, v, decay, state.at[row], new.at[row], out, *scratch)

    @varying.of_a_kernel
    def run(*arrays):
        run = _kernel(body, (out, new), v_BTHV.shape, q_BTHK.shape[-1], interpret)
        return run(*map(varying.forget, arrays))

    return run(q_BTHK, k_BTHK, v_BTHV, jnp.exp(log_decay_H), state_BHKV)


def step_slots(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    log_decay_H: jax.Array,
    pool_SHKV: jax.Array,
    slots_B: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """One step of the states in the slots, in place; rows whose slot is none give zeros."""
    q_BTHK, k_BTHK, v_BTHV = (x[:, None] for x in (q_BHK, k_BHK, v_BHV))
    out = jax.ShapeDtypeStruct(v_BTHV.shape, q_BHK.dtype)
    pool = jax.new_ref(pool_SHKV)

    def body(q, k, v, decay, slots, pool, out, *scratch):
        row, head, columns = _place()
        slot = slots[row]
        is_live = (slot >= 0) & (slot < pool_SHKV.shape[0])

        @pl.when(is_live)
        def _():
            state = pool.at[slot]
            _step_block(q, k, v, decay, state, state, out, *scratch)

        @pl.when(~is_live)
        def _():
            zeros = jnp.zeros((COLUMNS,), out.dtype)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(0))
            store(out.at[row, 0, head, columns], zeros)

    run = _kernel(body, (out,), v_BTHV.shape, q_BHK.shape[-1], interpret)
    (out_BTHV,) = run(q_BTHK, k_BTHK, v_BTHV, jnp.exp(log_decay_H), slots_B, pool)
    return out_BTHV[:, 0], jax.freeze(pool)


def _kernel(body, out_type, v_shape, key_dim, interpret):
    batch, _, heads, value_dim = v_shape

    def with_scratch(*refs):
        tile = plgpu.SMEM((key_dim, COLUMNS), jnp.float32, transforms=_SWIZZLED)
        pl.run_scoped(functools.partial(body, *refs), tile, plgpu.Barrier())

    # Not plgpu.kernel: it takes no reference to an array that is changed in place.
    return pl.kernel(
        with_scratch,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(batch, heads, value_dim // COLUMNS), grid_names=("row", "head", "columns")
        ),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
        name="lightning_decode",
    )


def _place():
    columns = pl.ds(lax.axis_index("columns") * COLUMNS, COLUMNS)
    return lax.axis_index("row"), lax.axis_index("head"), columns


def _step_block(q, k, v, decay, state, new, out, tile, loaded):
    """Step this block's columns of one head: from `state[H, K, V]` to `new`."""
    row, head, columns = _place()
    plgpu.copy_gmem_to_smem(state.at[head, :, columns], tile, loaded)
    decay = decay[head]
    shape = tile.shape
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def wide(ref, layout, dim):
        x = load(ref, layout, optimized=False).astype(jnp.float32)
        return lax.broadcast_in_dim(x, shape, [dim])

    def token(t, state_KV):
        k_KV = wide(k.at[row, t, head], by_row, 0)
        v_KV = wide(v.at[row, t, head, columns], by_column, 1)
        state_KV = decay * state_KV + k_KV * v_KV
        out_V = jnp.sum(wide(q.at[row, t, head], by_row, 0) * state_KV, axis=0)
        store(out.at[row, t, head, columns], out_V.astype(out.dtype))
        return state_KV

    plgpu.barrier_wait(loaded)
    state_KV = load(tile, plgpu.Layout.WGMMA)
    state_KV = lax.fori_loop(0, q.shape[1], token, state_KV)
    tile[...] = state_KV
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, new.at[head, :, columns])
    plgpu.wait_smem_to_gmem(0)
