"""What the arguments of softmax attention must fulfil, checked once at its border."""

import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")


def check_arrays(q, k, v) -> None:
    """Ranks, dtypes and the sizes q, k and v share."""
    for name, x, dims in (("q", q, "B T H K"), ("k", k, "B S G K"), ("v", v, "B S G V")):
        if x.ndim != 4:
            raise ValueError(
                f"softmax_attention needs {name} of shape [{dims}], got shape {x.shape}"
            )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.name in DTYPES):
        raise ValueError(
            f"softmax_attention needs q, k and v of one dtype, {' or '.join(DTYPES)}, got "
            f"{q.dtype.name}, {k.dtype.name} and {v.dtype.name}; cast them before the call"
        )
    (B, _, H, K), (_, S, G, _) = q.shape, k.shape
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G):
        raise ValueError(
            f"softmax_attention needs k [B S G K] and v [B S G V] to match q [B T H K], got q "
            f"{q.shape}, k {k.shape}, v {v.shape}"
        )
    if not K or not G or H % G:
        raise ValueError(
            f"softmax_attention needs a head size K >= 1 and query heads H a multiple of key-value "
            f"heads G >= 1, got K={K}, H={H}, G={G}"
        )


def check_integers(name: str, x, shape: tuple[int, ...]) -> None:
    """An optional integer array has its shape."""
    if x is None:
        return
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"softmax_attention needs {name} as integers of shape {shape}, got {x.dtype.name} of "
            f"shape {x.shape}"
        )


def check_segments(q_segment_ids, kv_segment_ids, q_shape, kv_shape) -> None:
    """Segments are given for queries and keys, or for neither."""
    if (q_segment_ids is None) != (kv_segment_ids is None):
        given = "q_segment_ids" if kv_segment_ids is None else "kv_segment_ids"
        raise ValueError(
            f"softmax_attention got {given} alone; give q_segment_ids [B, T] and kv_segment_ids "
            "[B, S] together, or neither"
        )
    check_integers("q_segment_ids", q_segment_ids, q_shape)
    check_integers("kv_segment_ids", kv_segment_ids, kv_shape)
