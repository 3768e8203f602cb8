"""What the public functions refuse about their arguments, and with what words."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compute_dtype(**arrays: jax.Array) -> np.dtype:
    """The dtype of states; floating arrays only."""
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    # Not jnp.promote_types: under strict promotion it refuses bfloat16 beside float32.
    return jnp.dtype(jnp.float64 if arrays["q"].dtype == jnp.float64 else jnp.float32)


def check_shape(name: str, x: jax.Array, expected: tuple[int | str, ...]) -> None:
    """The exact shape; a str stands for a size that is free but had no dimension."""
    if x.shape != expected:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} must have shape [{wanted}] to go with q, got {list(x.shape)}")


def check_qkv(q, k, v, dims: str) -> np.dtype:
    """q and k of shape `[dims, K]`, v of `[dims, V]`, K and V at least 1; the dtype of states."""
    rank = len(dims.split()) + 1
    if q.ndim != rank or 0 in q.shape[-2:]:
        wanted = ", ".join((*dims.split(), "K"))
        raise ValueError(f"q must have shape [{wanted}] with H, K >= 1, got {q.shape}")
    compute = compute_dtype(q=q, k=k, v=v)
    check_shape("k", k, q.shape)
    check_shape("v", v, (*q.shape[:-1], v.shape[-1] if v.ndim == rank else "V"))
    return compute


def check_state(name, state, shape, dtype) -> jax.Array:
    """A floating array of that shape, cast to the dtype of states."""
    state = jnp.asarray(state)
    check_shape(name, state, shape)
    if not jnp.issubdtype(state.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {state.dtype}")
    return state.astype(dtype)


def check_integers(name, ids, shape) -> jax.Array:
    """Integers of that shape, as int32."""
    ids = jnp.asarray(ids)
    check_shape(name, ids, shape)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers (int32), got {ids.dtype}")
    return ids.astype(jnp.int32)


def check_log_decay(log_decay, heads: int, dtype) -> jax.Array:
    """Finite and at most 0, where the values are known."""
    if not isinstance(log_decay, jax.core.Tracer):
        values = np.asarray(log_decay, np.float64)
        if not (np.isfinite(values).all() and (values <= 0).all()):
            raise ValueError(
                "log_decay must be finite and <= 0 (the state decays by exp(log_decay) a token), "
                f"got {values.tolist()}; for slopes s > 0 pass -s"
            )
    log_decay = jnp.asarray(log_decay)
    check_shape("log_decay", log_decay, (heads,))
    return log_decay.astype(dtype)


def check_choice(implementation: str | None, interpret: Any, choices: Mapping[str, Any]) -> None:
    """An implementation that exists, and interpreting only what can be interpreted."""
    if implementation is not None and implementation not in choices:
        names = ", ".join(repr(name) for name in choices)
        raise ValueError(
            f"there is no implementation {implementation!r}; choose one of {names}, or None for "
            "the automatic choice"
        )
    if interpret and not (implementation or "").startswith("pallas_"):
        raise ValueError(
            f"interpret={interpret!r} is for a Pallas implementation named with it; "
            f"implementation={implementation!r} has nothing to interpret: leave it False"
        )
