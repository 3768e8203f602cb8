"""Lightning attention for NVIDIA Hopper: three more passes of the forward kernel are its gradient.

Forward moves the least bytes there are, q, k, v in and out out. The gradient moves 12 tensors of
that size, where 7 is the least: dk and dv share their inputs, but fused they want a whole state of
128 x 128 a head, and with the 64 heads of MiniMax-Text-01 that leaves half of the chip idle.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import Unsupported
from pallas_kernels.lightning_attention import xla
from pallas_kernels.lightning_attention.pallas_gpu import kernel
from pallas_kernels.lightning_attention.pallas_gpu.decays import Segments
from pallas_kernels.lightning_attention.pallas_gpu.plan import chunk_size
from pallas_kernels.lightning_attention.pallas_gpu.versions import TILE_ROWS, interpret_params

HEAD_SIZES = (64, 128)


def why_not(target: str, q, k, v, *_) -> str | None:
    """Why this implementation cannot serve a call, or None; looks at shapes and dtypes only."""
    if target != "hopper":
        return f"it is for NVIDIA Hopper (compute capability 9.x), not for {target}"
    return unsupported(q, k, v)


def unsupported(q, k, v) -> str | None:
    """A reason that holds whatever the program is compiled for, or None."""
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if dtypes != {"bfloat16"}:
        return (
            "it multiplies in bfloat16 and rounds no other inputs silently; cast them, or take "
            f"implementation='xla': got {', '.join(sorted(dtypes))}"
        )
    sizes = q.shape[-1], v.shape[-1]
    if not set(sizes) <= set(HEAD_SIZES):
        return f"head sizes must be 64 or 128, got K={sizes[0]} and V={sizes[1]}"
    return None


def forward(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Out and final state."""
    return _pass(
        interpret, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT,
        reverse=False,
        # With segments there are no registers left for more.
        rounds_weights=segment_ids_BT is not None,
    )  # fmt: skip


def backward(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT, dout_BTHV, dfinal_BHKV,
    *, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of q, k, v and the initial state."""
    ids_BT = segment_ids_BT
    state_BHVK, dfinal_BHVK = state_BHKV.swapaxes(2, 3), dfinal_BHKV.swapaxes(2, 3)
    run = functools.partial(_pass, interpret, rounds_weights=True)
    dq_BTHK, _ = run(dout_BTHV, v_BTHV, k_BTHK, log_decay_H, state_BHVK, ids_BT, reverse=False)
    run = functools.partial(run, reverse=True)
    dk_BTHK, _ = run(v_BTHV, dout_BTHV, q_BTHK, log_decay_H, dfinal_BHVK, ids_BT)
    dv_BTHV, dstate_BHKV = run(k_BTHK, q_BTHK, dout_BTHV, log_decay_H, dfinal_BHKV, ids_BT)
    return dq_BTHK, dk_BTHK, dv_BTHV, dstate_BHKV


def _pass(
    interpret, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, ids_BT, *, reverse, rounds_weights
):
    if reason := unsupported(q_BTHK, k_BTHK, v_BTHV):
        raise Unsupported(f"lightning_attention implementation 'pallas_gpu': {reason}")
    if 0 in v_BTHV.shape:
        return jnp.zeros_like(v_BTHV), state_BHKV
    length, chunk = q_BTHK.shape[1], chunk_size(q_BTHK.shape[-1])
    q_BTHK, k_BTHK, v_BTHV = (_whole_tiles(x, length) for x in (q_BTHK, k_BTHK, v_BTHV))
    out_BTHV, final_BHKV = kernel.lightning_attention(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV,
        None if ids_BT is None else _segments(ids_BT, chunk),
        length=length, reverse=reverse, rounds_weights=rounds_weights,
        interpret=interpret_params(interpret),
    )  # fmt: skip
    return out_BTHV[:, :length], final_BHKV


def _whole_tiles(x_BTHK: jax.Array, length: int) -> jax.Array:
    """With zeros behind the tokens, which the kernel does not count, up to whole rows of tiles.

    It copies no part of a tile from the memory of the GPU: other lengths do not compile.
    """
    missing = -length % TILE_ROWS
    return jnp.pad(x_BTHK, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x_BTHK


def _segments(segment_ids_BT: jax.Array, chunk: int) -> Segments:
    """Count real tokens and changes of segment from the start of every chunk."""
    batch, length = segment_ids_BT.shape
    located = xla.locate(segment_ids_BT)

    def chunked(is_counted_BT):
        return jnp.pad(is_counted_BT, ((0, 0), (0, -length % chunk))).reshape(batch, -1, chunk)

    is_real_BNC = chunked(located.is_real_BT)
    count_BNC, run_BNC = (
        jnp.cumsum(chunked(x_BT), axis=2, dtype=jnp.int32).astype(jnp.float32) for x_BT in located
    )
    return Segments(
        jnp.stack([count_BNC, jnp.where(is_real_BNC, run_BNC, -1.0)], axis=1).reshape(batch, 2, -1),
        jnp.stack([count_BNC[..., -1], run_BNC[..., -1]], axis=1),
    )
