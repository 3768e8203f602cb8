"""Decoding: states pass through VMEM once, and the arithmetic, in float32, hides behind that."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.pallas_tpu import passes

# Tokens up to which stepping one by one stays behind the copies of the state; more are a chunk.
_FEW_TOKENS = 8

# What a row does with the block of the pool it is given.
_SKIPS, _STEPS, _COPIES = range(3)


def decode(
    q_BHK, k_BHK, v_BHV, log_decay_H, state_BHKV, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """One token for every row; the new states take the memory of the old if those are donated."""
    rows_B = jnp.arange(q_BHK.shape[0], dtype=jnp.int32)
    out_B1HV, state_BHKV = _call(
        q_BHK[:, None], k_BHK[:, None], v_BHV[:, None], log_decay_H, state_BHKV,
        rows_B, jnp.full_like(rows_B, _STEPS), interpret,
    )  # fmt: skip
    return out_B1HV[:, 0], state_BHKV


def decode_slots(
    q_BHK, k_BHK, v_BHV, log_decay_H, pool_SHKV, slots_B, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """One token for every row with a slot.

    A row without one is given the block of the last row that has one: the block stays where it is,
    nothing is copied. Before the first such row it is given that row's, and hands it on unchanged.
    """
    is_live_B = (slots_B >= 0) & (slots_B < pool_SHKV.shape[0])
    row_B = jnp.arange(slots_B.shape[0], dtype=jnp.int32)
    last_B = jax.lax.cummax(jnp.where(is_live_B, row_B, -1))
    nearest_B = jnp.where(last_B >= 0, last_B, jnp.argmax(is_live_B).astype(jnp.int32))
    block_B = jnp.clip(slots_B[nearest_B], 0, pool_SHKV.shape[0] - 1)
    action_B = jnp.where(is_live_B, _STEPS, jnp.where(last_B >= 0, _SKIPS, _COPIES))
    out_B1HV, pool_SHKV = _call(
        q_BHK[:, None], k_BHK[:, None], v_BHV[:, None], log_decay_H, pool_SHKV,
        block_B, action_B.astype(jnp.int32), interpret,
    )  # fmt: skip
    return out_B1HV[:, 0], pool_SHKV


def extend(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """A few tokens step by step, exactly as decoding them would; more by chunks."""
    if q_BTHK.shape[1] > _FEW_TOKENS:
        return passes.forward(
            q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, None, interpret=interpret
        )
    if q_BTHK.size == 0:
        return jnp.zeros_like(v_BTHV, dtype=q_BTHK.dtype), state_BHKV
    rows_B = jnp.arange(q_BTHK.shape[0], dtype=jnp.int32)
    return _call(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV,
        rows_B, jnp.full_like(rows_B, _STEPS), interpret,
    )  # fmt: skip


def _call(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, states_SHKV, block_B, action_B, interpret
) -> tuple[jax.Array, jax.Array]:
    """Row b takes block_B[b] of the states through its tokens; states_SHKV is updated in place."""
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[3]
    heads = next((size for size in (16, 8) if H % size == 0), H)
    # Rows are in the inner, sequential dimension: neighbours may hold the same block.
    token_spec = lambda size: pl.BlockSpec((1, T, heads, size), lambda h, b, *_: (b, 0, h, 0))
    state_spec = pl.BlockSpec((1, heads, K, V), lambda h, b, block_B, *_: (block_B[b], h, 0, 0))
    shaped = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(states_SHKV).manual_axis_type
    )
    return pl.pallas_call(
        _kernel,
        out_shape=[shaped((B, T, H, V), q_BTHK.dtype), shaped(states_SHKV.shape, jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(H // heads, B),
            in_specs=[token_spec(K), token_spec(K), token_spec(V), state_spec],
            out_specs=[token_spec(V), state_spec],
        ),
        input_output_aliases={6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="lightning_decode",
        interpret=interpret,
    )(block_B, action_B, log_decay_H, q_BTHK, k_BTHK, v_BTHV, states_SHKV)


def _kernel(
    block_ref, action_ref, log_decay_ref, q_ref, k_ref, v_ref, state_ref, out_ref, new_ref
):  # fmt: skip
    """All tokens of one row for a block of heads."""
    action = action_ref[pl.program_id(1)]
    tokens, heads = q_ref.shape[1:3]
    first = pl.program_id(0) * heads
    log_decays = [log_decay_ref[first + h] for h in range(heads)]

    @pl.when(action != _STEPS)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(action == _COPIES)
    def _():
        new_ref[...] = state_ref[...]

    @pl.when(action == _STEPS)
    def _():
        _token(0, state_ref, log_decays, q_ref, k_ref, v_ref, out_ref, new_ref)

        def later(t, _):
            _token(t, new_ref, log_decays, q_ref, k_ref, v_ref, out_ref, new_ref)

        jax.lax.fori_loop(1, tokens, later, None)


def _token(t, state_ref, log_decays, q_ref, k_ref, v_ref, out_ref, new_ref):
    """One step of the recurrence, S = decay S + k v^T and out = q S, head by head."""
    # A head's k and q go down the rows of its state: as columns.
    q_KH, k_KH = (ref[0, t].astype(jnp.float32).T for ref in (q_ref, k_ref))
    v_HV = v_ref[0, t].astype(jnp.float32)
    outs = []
    for h, log_decay in enumerate(log_decays):
        decay_1V = jnp.exp(jnp.full((1, v_HV.shape[1]), log_decay, jnp.float32))
        state_KV = decay_1V * state_ref[0, h] + k_KH[:, h : h + 1] * v_HV[h : h + 1]
        new_ref[0, h] = state_KV
        outs.append(jnp.sum(q_KH[:, h : h + 1] * state_KV, axis=0, keepdims=True))
    out_ref[0, t] = jnp.concatenate(outs).astype(out_ref.dtype)
