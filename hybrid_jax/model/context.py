"""What every layer may see besides its input: segments, positions, and where a cache continues."""

import dataclasses

import jax
import jax.numpy as jnp

from hybrid_jax.model.parallel.placement import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass."""

    positions_BT: jax.Array
    """int32, counted from 0 in each segment, or from the cached length."""
    segment_ids_BT: jax.Array | None
    """int32, 0 for padding; None when every row is one segment without padding."""
    lengths_B: jax.Array | None = None
    """int32, tokens already in the decode state; None without a state."""
    layer_idx: jax.Array | None = None
    """int32 scalar: place of this layer where experts or caches of many layers come as one stack;
    None without a state."""
    placement: Placement | None = dataclasses.field(default=None, metadata={"static": True})
    """How everything is split over devices; None on one device."""


def segment_positions(segment_ids_BT):
    """Positions [B, T] int32 counted from 0 in each segment over its real tokens.

    Padding (id 0) inside a segment is not counted: equal ids across it continue.
    """
    B, T = segment_ids_BT.shape
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    real_BT = segment_ids_BT != 0
    last_real_BT = jax.lax.cummax(jnp.where(real_BT, index_BT, -1), axis=1)
    before_BT = jnp.pad(last_real_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id_BT = jnp.where(
        before_BT >= 0, jnp.take_along_axis(segment_ids_BT, jnp.maximum(before_BT, 0), axis=1), 0
    )
    count_BT = jnp.cumsum(real_BT.astype(jnp.int32), axis=1) - 1
    starts_BT = real_BT & (previous_id_BT != segment_ids_BT)
    start_count_BT = jax.lax.cummax(jnp.where(starts_BT, count_BT, 0), axis=1)
    return jnp.maximum(count_BT - start_count_BT, 0)
