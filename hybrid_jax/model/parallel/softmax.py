"""Softmax attention of rows whose tokens are split over devices, by three ways to meet the keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.model.parallel.ring import Ring, ring_attention
from pallas_kernels import softmax_attention
from sharding import Axis


def split_softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    axis: Axis = "sequence",
    method: str = "ring",
    implementation: str | None = None,
) -> jax.Array:
    """`softmax_attention` inside `jax.shard_map`, T tokens a device: out_BTHV in q's dtype.

    Device r of the axis holds the r-th T tokens of each row, in queries, keys, values and output.
    Heads and rows may be split over other axes. A device sends, in arrays of its share:

    * "ring": forward q, k, v and out once (half of each goes to two devices so that all do the same
      work), k and v n - 1 times more; backward d_out, dq, dk, dv once, k and v n - 1 times, and n
      times dk and dv in float32. Memory does not grow with n. T must be even.
    * "all_gather": k and v to n - 1 devices, backward dk and dv. Every device holds the keys of
      whole rows, and the last one does twice the work of the mean.
    * "heads": once q, k, v and out, backward the same: whole rows of 1/n of the heads. n divides H,
      and G or G divides n; in the latter case k and v are sent to n/G devices.

    Args:
      q_BTHK, k_BTGK, v_BTGV: as in `softmax_attention`.
      segment_ids: int32 [B, n * T], the whole rows on every device of the axis; 0 for padding.
      axis: the mesh axis, or axes in the order of the mesh, of n devices, that split time.
      method: "ring", "all_gather" or "heads".
      implementation: of the kernel, as in `softmax_attention`; "ring" takes "splash" and "xla".

    Raises:
      ValueError: arguments that do not fit together, or the axis; the message says which.

    Sources: Liu et al., Ring Attention (arXiv 2310.01889); Jacobs et al., DeepSpeed Ulysses (arXiv
    2309.14509) for "heads".
    """
    if method not in METHODS:
        names = ", ".join(repr(name) for name in METHODS)
        raise ValueError(f"split_softmax_attention has no method {method!r}; choose one of {names}")
    size = lax.axis_size(axis)
    B, T = q_BTHK.shape[:2]
    if k_BTGK.shape[1] != T:
        raise ValueError(
            f"split_softmax_attention needs as many keys as queries on a device, got {T} queries "
            f"and {k_BTGK.shape[1]} keys; a cache is not split over {axis!r}"
        )
    if segment_ids is not None and segment_ids.shape != (B, size * T):
        raise ValueError(
            f"split_softmax_attention needs segment_ids of whole rows, {(B, size * T)} for {size} "
            f"devices of {T} tokens on {axis!r}, got {segment_ids.shape}; do not split them over it"
        )
    if size == 1:
        return softmax_attention(
            *(q_BTHK, k_BTGK, v_BTGV),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            implementation=implementation,
        )
    return METHODS[method](q_BTHK, k_BTGK, v_BTGV, segment_ids, axis, implementation)


def _ring(q_BTHK, k_BTGK, v_BTGV, segment_ids, axis, implementation):
    T = q_BTHK.shape[1]
    if T % 2:
        raise ValueError(
            f"ring attention halves a device's tokens, got {T} on each of {lax.axis_size(axis)} "
            f"devices of {axis!r}; pad the rows to a multiple of {2 * lax.axis_size(axis)}, or use "
            "method='all_gather'"
        )
    return ring_attention(Ring(axis, implementation), q_BTHK, k_BTGK, v_BTGV, segment_ids)


def _all_gather(q_BTHK, k_BTGK, v_BTGV, segment_ids, axis, implementation):
    B, T = q_BTHK.shape[:2]
    k_BSGK, v_BSGV = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_BTGK, v_BTGV))
    start = lax.axis_index(axis) * T
    q_segment_BT = None
    if segment_ids is not None:
        q_segment_BT = lax.dynamic_slice_in_dim(segment_ids, start, T, axis=1)
    return softmax_attention(
        *(q_BTHK, k_BSGK, v_BSGV),
        q_segment_ids=q_segment_BT,
        kv_segment_ids=segment_ids,
        q_offset=jnp.full(B, start, jnp.int32),
        implementation=implementation,
    )


def _heads(q_BTHK, k_BTGK, v_BTGV, segment_ids, axis, implementation):
    size, H, G = lax.axis_size(axis), q_BTHK.shape[2], k_BTGK.shape[2]
    if H % size or (G % size and size % G):
        raise ValueError(
            f"method='heads' deals heads to the {size} devices of {axis!r}: it needs H a multiple "
            f"of {size}, and G a multiple or a divisor of it, got H={H}, G={G} on a device; use "
            "method='ring'"
        )
    copies = max(1, size // G)

    def to_heads(x_BTHK):
        return lax.all_to_all(x_BTHK, axis, split_axis=2, concat_axis=1, tiled=True)

    out_BSHV = softmax_attention(
        to_heads(q_BTHK),
        to_heads(jnp.repeat(k_BTGK, copies, axis=2)),
        to_heads(jnp.repeat(v_BTGV, copies, axis=2)),
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        implementation=implementation,
    )
    return lax.all_to_all(out_BSHV, axis, split_axis=1, concat_axis=2, tiled=True)


METHODS: dict[str, Callable[..., jax.Array]] = {
    "ring": _ring,
    "all_gather": _all_gather,
    "heads": _heads,
}
