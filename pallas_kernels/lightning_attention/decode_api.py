"""Continuing from states: one token a row, one token a slot of a pool, a few tokens a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target, varying
from pallas_kernels.lightning_attention import checks, decode_xla, pallas_gpu, pallas_tpu


class Steps(NamedTuple):
    """The three functions of one implementation, on arrays that have been checked.

    Each takes its public counterpart's arrays, states in float32 (float64 for float64 q, which an
    implementation may decline), integers in int32; a Pallas implementation's also `interpret=`.
    """

    decode: Callable[..., tuple[jax.Array, jax.Array]]
    decode_slots: Callable[..., tuple[jax.Array, jax.Array]]
    extend: Callable[..., tuple[jax.Array, jax.Array]]
    why_not: Callable[..., str | None] | None = None
    """(target, q, k, v, log_decay, state or pool, ...) -> the reason to decline, or None."""


IMPLEMENTATIONS = {
    "xla": Steps(decode_xla.decode, decode_xla.decode_slots, decode_xla.extend),
    "pallas_tpu": Steps(
        pallas_tpu.decode.decode,
        pallas_tpu.decode.decode_slots,
        pallas_tpu.decode.extend,
        pallas_tpu.why_not,
    ),
    "pallas_gpu": Steps(
        pallas_gpu.decode.decode,
        pallas_gpu.decode.decode_slots,
        pallas_gpu.decode.extend,
        pallas_gpu.decode.why_not,
    ),
}
# Tried in turn for the target compiled for; `why_not` says for which targets and sizes.
AUTOMATIC_ORDER = ("pallas_tpu", "pallas_gpu", "xla")


def lightning_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One token of `lightning_attention` for every row: the step from `state` to the next.

    Args:
      q, k: `[B, H, K]`; v: `[B, H, V]`; log_decay: `[H]`; state: `[B, H, K, V]`.
      implementation: a name of IMPLEMENTATIONS, or None to choose by the target compiled for.
      interpret: True or a backend's interpret parameters, with a Pallas implementation named.

    Returns:
      out `[B, H, V]` in q's dtype and the new state, float32 (float64 for float64 q).

    Raises:
      ValueError: shapes, dtypes or decays do not fit, or the implementation does not exist.
      Unsupported: the named implementation cannot serve this call.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    compute = checks.check_qkv(q, k, v, "B H")
    log_decay = checks.check_log_decay(log_decay, q.shape[1], compute)
    state = checks.check_state("state", state, (*q.shape, v.shape[-1]), compute)
    return _call("decode", implementation, interpret, q, k, v, log_decay, state)


def lightning_decode_slots(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    pool: jax.Array,
    slots: jax.Array,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """One token for every row, its state lying in a slot of a pool that is updated in place.

    Donate the pool (`jax.jit(..., donate_argnames=...)`), or the compiler copies it first.

    Args:
      q, k: `[B, H, K]`; v: `[B, H, V]`; log_decay: `[H]`.
      pool: `[S, H, K, V]`, float32 (float64 for float64 q; no other, for a cast would be a copy).
      slots: `[B]` integers. Row b steps pool[slots[b]]. A row whose slot is -1, or any other number
        outside 0 to S-1, is ignored: it writes nothing and yields zeros. No slot may come twice.
      implementation, interpret: as in `lightning_decode`.

    Returns:
      out `[B, H, V]` in q's dtype and the pool; slots that are not named keep what they hold.

    Raises:
      ValueError: shapes, dtypes or decays do not fit, or the implementation does not exist.
      Unsupported: the named implementation cannot serve this call.
    """
    q, k, v, pool = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(pool)
    compute = checks.check_qkv(q, k, v, "B H")
    log_decay = checks.check_log_decay(log_decay, q.shape[1], compute)
    slot_count = pool.shape[0] if pool.ndim == 4 else "S"
    checks.check_shape("pool", pool, (slot_count, *q.shape[1:], v.shape[-1]))
    if pool.dtype != compute:
        raise ValueError(f"pool must be {compute} to go with q, got {pool.dtype}")
    slots = checks.check_integers("slots", slots, q.shape[:1])
    if 0 in (pool.shape[0], q.shape[0]):
        return jnp.zeros_like(v, dtype=q.dtype), pool
    return _call("decode_slots", implementation, interpret, q, k, v, log_decay, pool, slots)


def lightning_extend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """A few tokens of `lightning_attention` after a state: speculative tokens, a short prompt.

    For many tokens, or where a gradient is wanted, take `lightning_attention`.

    Args:
      q, k: `[B, T, H, K]`; v: `[B, T, H, V]`; log_decay: `[H]`; state: `[B, H, K, V]`.
      implementation, interpret: as in `lightning_decode`.

    Returns:
      out `[B, T, H, V]` in q's dtype and the state after the last token, float32 (float64 for
      float64 q).

    Raises:
      ValueError: shapes, dtypes or decays do not fit, or the implementation does not exist.
      Unsupported: the named implementation cannot serve this call.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    compute = checks.check_qkv(q, k, v, "B T H")
    log_decay = checks.check_log_decay(log_decay, q.shape[2], compute)
    shape = (q.shape[0], *q.shape[2:], v.shape[-1])
    state = checks.check_state("state", state, shape, compute)
    if q.shape[1] == 0:
        return jnp.zeros_like(v, dtype=q.dtype), state
    return _call("extend", implementation, interpret, q, k, v, log_decay, state)


def choices(*arrays) -> dict[target.Target, dispatch.Choice]:
    """For every target, the implementation the automatic choice takes, and why not the others."""
    why_not = {name: steps.why_not for name, steps in IMPLEMENTATIONS.items() if steps.why_not}
    return dispatch.choose(AUTOMATIC_ORDER, why_not, *arrays)


def _call(step: str, implementation: str | None, interpret, *arrays):
    checks.check_choice(implementation, interpret, IMPLEMENTATIONS)
    arrays = varying.alike(*arrays)
    if implementation is None:
        branches = {
            place: getattr(IMPLEMENTATIONS[choice.name], step)
            for place, choice in choices(*arrays).items()
        }
        return target.select(branches, *arrays)
    steps = IMPLEMENTATIONS[implementation]
    if interpret:
        return getattr(steps, step)(*arrays, interpret=interpret)
    dispatch.demand(steps.why_not, *arrays)
    return getattr(steps, step)(*arrays)
