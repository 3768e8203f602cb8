"""States of lightning attention without its outputs: what one part of a split row tells the rest.

Both are ends of the op's own passes, and neither has a gradient rule: they are for such rules.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target, varying
from pallas_kernels.lightning_attention import checks, pallas_tpu, state_xla

# By name, the two passes.
_PASSES: dict[str, tuple[Callable[..., jax.Array], ...]] = {
    "xla": (state_xla.forward, state_xla.backward),
    "pallas_tpu": (pallas_tpu.state_forward, pallas_tpu.state_backward),
}
_WHY_NOT = {"pallas_tpu": pallas_tpu.why_not}
_AUTOMATIC_ORDER = ("pallas_tpu", "xla")


def lightning_state(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The final state of `lightning_attention` of these arguments, for an initial one of zeros.

    Args:
      k: `[B, T, H, K]`; v: `[B, T, H, V]`; log_decay: `[H]`; segment_ids: `[B, T]` or None.

    Returns:
      `[B, H, K, V]`, float32 (float64 for float64 k).

    Raises:
      ValueError: shapes, dtypes or decays do not fit.
    """
    return _call(0, k, v, log_decay, segment_ids)


def lightning_state_gradient(
    q: jax.Array,
    dout: jax.Array,
    log_decay: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The gradient of the initial state of `lightning_attention`, if the final one's is zero.

    Args:
      q: `[B, T, H, K]`; dout: `[B, T, H, V]`, the gradient of out; the others as above.

    Returns:
      `[B, H, K, V]`, float32 (float64 for float64 q).

    Raises:
      ValueError: shapes, dtypes or decays do not fit.
    """
    return _call(1, q, dout, log_decay, segment_ids)


def choices(*arrays) -> dict[target.Target, dispatch.Choice]:
    """For every target, the implementation of both, and why not the others."""
    return dispatch.choose(_AUTOMATIC_ORDER, _WHY_NOT, *arrays)


def _call(index: int, x, y, log_decay, segment_ids) -> jax.Array:
    """One of the passes, by the target compiled for; the state it starts from is zeros."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    compute = checks.check_qkv(x, x, y, "B T H")
    batch, length, heads, key_dim = x.shape
    log_decay = checks.check_log_decay(log_decay, heads, compute)
    if segment_ids is not None:
        segment_ids = checks.check_integers("segment_ids", segment_ids, (batch, length))
    zeros = jnp.zeros((batch, heads, key_dim, y.shape[-1]), compute)
    chosen = choices(x, x, y)
    branches = {place: _PASSES[choice.name][index] for place, choice in chosen.items()}
    return target.select(branches, *varying.alike(x, y, log_decay, zeros, segment_ids))
