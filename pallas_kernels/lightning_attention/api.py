"""The public face of lightning attention: argument checks and the choice of implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target, varying
from pallas_kernels.lightning_attention import checks, pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.lightning_attention.gradient import Passes, attend

# Two passes each under one gradient rule; "reference" beside them is differentiated by JAX.
PASSES = {
    "xla": Passes(xla.forward, xla.backward),
    "pallas_tpu": Passes(pallas_tpu.forward, pallas_tpu.backward),
    "pallas_gpu": Passes(pallas_gpu.forward, pallas_gpu.backward),
}
# By name: (target, q, k, v, ...) -> why this implementation cannot serve the call, or None.
WHY_NOT = {"pallas_tpu": pallas_tpu.why_not, "pallas_gpu": pallas_gpu.why_not}
# Tried in turn for each target a program may be compiled for. The last one takes every call.
AUTOMATIC_ORDER = ("pallas_tpu", "pallas_gpu", "xla")
_NAMES = dict.fromkeys(("reference", *PASSES))


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with a fixed decay a head: S_t = exp(log_decay) S_{t-1} + k_t v_t^T.

    out_t = q_t S_t: no scale, no feature map, the current token undecayed (MiniMax-01 report,
    arXiv 2501.08313; the convention of the released modeling_minimax_m1.py in float32).

    Args:
      q, k: `[B, T, H, K]`, floating. Any T, also 0.
      v: `[B, T, H, V]`.
      log_decay: `[H]`, finite and <= 0 (not checked under a JAX transformation).
      initial_state: `[B, H, K, V]`, the state before a row's first segment; None is zeros.
      segment_ids: `[B, T]` integers; None is one segment. 0 is padding: it neither writes nor
        decays the state, and yields zeros. A change of id resets the state; ids equal across
        padding continue.
      implementation: "pallas_tpu", "pallas_gpu", "xla", "reference" (token by token, the
        definition), or None to choose by the target compiled for: the kernel of its kind if it can
        serve the call.
      interpret: True or a backend's interpret parameters, with a Pallas implementation named.

    Returns:
      out `[B, T, H, V]` in q's dtype, and the state after each row's last segment
      `[B, H, K, V]`, float32 (float64 for float64 q). A row of padding returns its initial state.

    Raises:
      ValueError: shapes, dtypes or decays do not fit, or the implementation does not exist.
      Unsupported: the named implementation cannot serve this call.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    compute = checks.check_qkv(q, k, v, "B T H")
    batch, length, heads, key_dim = q.shape
    log_decay = checks.check_log_decay(log_decay, heads, compute)
    state_shape = (batch, heads, key_dim, v.shape[-1])
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, compute)
    else:
        initial_state = checks.check_state("initial_state", initial_state, state_shape, compute)
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, (batch, length))
    checks.check_choice(implementation, interpret, _NAMES)
    arrays = varying.alike(q, k, v, log_decay, initial_state, segment_ids)
    if implementation == "reference":
        return reference.lightning_attention(*arrays)
    if implementation is not None:
        return attend(_named(implementation, interpret, arrays), *arrays)
    chosen = choices(*arrays)
    return attend(_by_target(tuple(chosen[place].name for place in target.TARGETS)), *arrays)


def choices(*arrays) -> dict[target.Target, dispatch.Choice]:
    """For every target, the implementation the automatic choice takes, and why not the others."""
    return dispatch.choose(AUTOMATIC_ORDER, WHY_NOT, *arrays)


def _named(implementation: str, interpret: Any, arrays) -> Passes:
    if interpret:
        return _interpreted(implementation, interpret)
    dispatch.demand(WHY_NOT.get(implementation), *arrays)
    return PASSES[implementation]


@functools.cache
def _interpreted(implementation: str, interpret: Any) -> Passes:
    return Passes(*(functools.partial(p, interpret=interpret) for p in PASSES[implementation]))


@functools.cache
def _by_target(names: tuple[str, ...]) -> Passes:
    """Each pass of the implementation named for the target that the program is compiled for."""

    def one(index):
        branches = {
            place: PASSES[name][index] for place, name in zip(target.TARGETS, names, strict=True)
        }
        return functools.partial(target.select, branches)

    return Passes(one(0), one(1))
