"""Decoding on Hopper GPUs: one kernel that reads and writes each state once."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import Unsupported
from pallas_kernels.lightning_attention.pallas_gpu import decode_kernel, passes
from pallas_kernels.lightning_attention.pallas_gpu.versions import interpret_params

# Tokens that `extend` takes one after the other; the time is the state's, not theirs, up to about
# eight, and beyond these a pass of chunks is faster.
_FEW = 16


def why_not(target: str, q, k, v, log_decay, state, *_) -> str | None:
    """Why these functions cannot serve a call, or None; looks at shapes and dtypes only."""
    if target != "hopper":
        # Blackwell's compiler fails on the kernel (jax 0.10.2, sm_100: "Pass pipeline failed").
        return f"it is for NVIDIA Hopper, not for {target}"
    return _unsupported(q, k, v, state)


def _unsupported(q, k, v, state) -> str | None:
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if not dtypes <= {"float32", "bfloat16"} or state.dtype != jnp.float32:
        return f"it computes in float32, from float32 or bfloat16, got {', '.join(sorted(dtypes))}"
    key_dim, value_dim = state.shape[-2:]
    if key_dim % 64 or key_dim > 256 or value_dim % decode_kernel.COLUMNS:
        return (
            f"K must be 64, 128, 192 or 256 and V a multiple of {decode_kernel.COLUMNS}, got "
            f"K={key_dim} and V={value_dim}"
        )
    tokens = q.shape[1] if q.ndim == 4 else 1
    if tokens > _FEW and (reason := passes.unsupported(q, k, v)):
        return f"it extends by {_FEW} tokens at most where lightning_attention's {reason}"
    return None


def _check(q, k, v, state) -> None:
    if reason := _unsupported(q, k, v, state):
        raise Unsupported(f"decoding implementation 'pallas_gpu': {reason}")


def decode(
    q_BHK, k_BHK, v_BHV, log_decay_H, state_BHKV, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence for every row, in float32."""
    q_BTHK, k_BTHK, v_BTHV = (x[:, None] for x in (q_BHK, k_BHK, v_BHV))
    out_BTHV, state_BHKV = extend(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, interpret=interpret
    )
    return out_BTHV[:, 0], state_BHKV


def decode_slots(
    q_BHK, k_BHK, v_BHV, log_decay_H, pool_SHKV, slots_B, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """One step of the states in the slots, where they lie."""
    _check(q_BHK, k_BHK, v_BHV, pool_SHKV)
    return decode_kernel.step_slots(
        q_BHK, k_BHK, v_BHV, log_decay_H, pool_SHKV, slots_B,
        interpret=interpret_params(interpret),
    )  # fmt: skip


def extend(
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """A few steps in one reading of the state; many tokens in chunks."""
    _check(q_BTHK, k_BTHK, v_BTHV, state_BHKV)
    if 0 in v_BTHV.shape:
        return jnp.zeros_like(v_BTHV, dtype=q_BTHK.dtype), state_BHKV
    if q_BTHK.shape[1] > _FEW:
        return passes.forward(
            q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, None, interpret=interpret
        )
    return decode_kernel.steps(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, interpret=interpret_params(interpret)
    )
