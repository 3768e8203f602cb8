"""The public face of lightning attention: argument checks and the choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, varying
from pallas_kernels.lightning_attention import reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.lightning_attention,
    "xla": xla.lightning_attention,
}
_AUTOMATIC_ORDER = ("xla",)


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
      implementation: "xla", "reference" (token by token, the definition), or None to choose.
      interpret: True or a backend's interpret parameters, for Pallas implementations only.

    Returns:
      out `[B, T, H, V]` in q's dtype, and the state after each row's last segment
      `[B, H, K, V]`, float32 (float64 for float64 q). A row of padding returns its initial state.

    Raises:
      ValueError: shapes, dtypes or decays do not fit, or the implementation does not exist.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q must have shape [B, T, H, K] with H, K >= 1, got {q.shape}")
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1] if v.ndim == 4 else "V"
    compute = _compute_dtype(q=q, k=k, v=v)
    _check_shape("k", k, q.shape)
    _check_shape("v", v, (batch, length, heads, value_dim))
    log_decay = _check_log_decay(log_decay, heads, compute)
    state_shape = (batch, heads, key_dim, value_dim)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, compute)
    else:
        initial_state = _check_state("initial_state", initial_state, state_shape, compute)
    if segment_ids is not None:
        segment_ids = _check_segment_ids(segment_ids, (batch, length))
    if interpret:
        raise ValueError(
            f"interpret={interpret!r} is for Pallas implementations; "
            f"{' and '.join(_IMPLEMENTATIONS)} have nothing to interpret: leave it False"
        )
    arrays = varying.alike(q, k, v, log_decay, initial_state, segment_ids)
    return dispatch.call(
        "lightning_attention", _IMPLEMENTATIONS, _AUTOMATIC_ORDER, *arrays,
        implementation=implementation,
    )  # fmt: skip


def lightning_decode(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of `lightning_attention`: the step from `state` to the next.

    Args:
      q, k: `[B, H, K]`; v: `[B, H, V]`; log_decay: `[H]`; state: `[B, H, K, V]`.

    Returns:
      out `[B, H, V]` in q's dtype and the new state, float32 (float64 for float64 q).

    Raises:
      ValueError: shapes, dtypes or decays do not fit.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if q.ndim != 3:
        raise ValueError(f"q must have shape [B, H, K], got {q.shape}")
    value_dim = v.shape[-1] if v.ndim == 3 else "V"
    compute = _compute_dtype(q=q, k=k, v=v)
    _check_shape("k", k, q.shape)
    _check_shape("v", v, (*q.shape[:2], value_dim))
    log_decay = _check_log_decay(log_decay, q.shape[1], compute)
    state = _check_state("state", state, (*q.shape, value_dim), compute)
    q_BHK, k_BHK, v_BHV = (x.astype(compute) for x in (q, k, v))
    decay_1H11 = jnp.exp(log_decay)[None, :, None, None]
    state = decay_1H11 * state + k_BHK[:, :, :, None] * v_BHV[:, :, None, :]
    return jnp.einsum("bhk,bhkv->bhv", q_BHK, state).astype(q.dtype), state


def _compute_dtype(**arrays: jax.Array) -> np.dtype:
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    # Not jnp.promote_types: under strict promotion it refuses bfloat16 beside float32.
    return jnp.dtype(jnp.float64 if arrays["q"].dtype == jnp.float64 else jnp.float32)


def _check_shape(name: str, x: jax.Array, expected: tuple[int | str, ...]) -> None:
    if x.shape != expected:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} must have shape [{wanted}] to go with q, got {list(x.shape)}")


def _check_state(name, state, shape, dtype) -> jax.Array:
    state = jnp.asarray(state)
    _check_shape(name, state, shape)
    if not jnp.issubdtype(state.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {state.dtype}")
    return state.astype(dtype)


def _check_segment_ids(segment_ids, shape):
    segment_ids = jnp.asarray(segment_ids)
    _check_shape("segment_ids", segment_ids, shape)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers (int32), got {segment_ids.dtype}")
    return segment_ids.astype(jnp.int32)


def _check_log_decay(log_decay, heads: int, dtype) -> jax.Array:
    if not isinstance(log_decay, jax.core.Tracer):
        values = np.asarray(log_decay, np.float64)
        if not (np.isfinite(values).all() and (values <= 0).all()):
            raise ValueError(
                "log_decay must be finite and <= 0 (the state decays by exp(log_decay) a token), "
                f"got {values.tolist()}; for slopes s > 0 pass -s"
            )
    log_decay = jnp.asarray(log_decay)
    _check_shape("log_decay", log_decay, (heads,))
    return log_decay.astype(dtype)
