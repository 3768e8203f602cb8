"""Lightning attention of rows whose time is split over a mesh axis: shards exchange states only.

Each shard sums up what it writes, one all-gather shows every shard the sums of all, and each
decays those before it to the state it starts from; then the op runs as on one device. Backward
the same happens in the other direction, with the gradients of states. This is LASP+ of the
MiniMax-01 report (arXiv 2501.08313), with documents that begin and end anywhere.

The states come before the op, and no correction after it: out is rounded once, as on one device,
and the exchange has whatever else does not need it to hide behind (the projections of q and of the
gate, and in the gradient that of q).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
from hybrid_jax.model import remat
from hybrid_jax.model.parallel import borders
from pallas_kernels import lightning_state, lightning_state_gradient, varying
from sharding import Axis


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    *,
    axis: Axis,
    initial_state_BHKV: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.lightning_attention` inside `jax.shard_map`, with T split over `axis`.

    Shards are contiguous and of equal length, the first holds the beginning. One all-gather of
    `[B, H, K, V]` forward and one backward; a decay that is differentiated costs one sum of `[H]`.

    Args:
      q_BTHK, k_BTHK, v_BTHV, log_decay_H: this shard's tokens (and heads).
      axis: the mesh axis, or axes in the order of the mesh.
      initial_state_BHKV: the state before the whole row, the same on all shards.
      segment_ids_BT: of the whole row, `[B, T of all shards]`, the same on all shards, so that
        they need not ask each other.

    Returns:
      out of this shard's tokens, and the state after the whole row, the same on all shards.

    Raises:
      ValueError: shapes do not fit, something is split that must not be, or varying axes are not
        checked (`jax.shard_map(check_vma=False)`).
    """
    num_shards = jax.lax.axis_size(axis)
    batch, length, heads, key_dim = q_BTHK.shape
    if not _axes(jax.lax.axis_index(axis)):
        raise ValueError(
            "lightning attention split over time must know which arrays differ by shard, or "
            "gradients of the others would count double: use jax.shard_map with check_vma=True"
        )
    state_shape = (batch, heads, key_dim, v_BTHV.shape[-1])
    if initial_state_BHKV is not None:
        _check_whole("initial_state_BHKV", initial_state_BHKV, state_shape, axis)
    if segment_ids_BT is not None:
        _check_whole("segment_ids_BT", segment_ids_BT, (batch, num_shards * length), axis)
    compute = jnp.float64 if q_BTHK.dtype == jnp.float64 else jnp.float32
    if initial_state_BHKV is None:
        initial_state_BHKV = jnp.zeros(state_shape, compute)
    log_decay_H = log_decay_H.astype(compute)
    # JAX sums gradients over the axes that are added here: each shard has its part of that of the
    # decays. The state before the row gets no `axis`, for every shard knows its whole gradient.
    arrays = varying.alike(q_BTHK, k_BTHK, v_BTHV, log_decay_H)
    initial_state_BHKV = jax.lax.pcast(
        initial_state_BHKV.astype(compute),
        tuple(_axes(arrays[0]) - _axes(initial_state_BHKV) - _named(axis)),
        to="varying",
    )
    whole = jax.lax.stop_gradient(log_decay_H), initial_state_BHKV, segment_ids_BT
    return _attend(axis, *arrays, *whole)


def _axes(x) -> frozenset[str]:
    """The mesh axes an array varies over."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _named(axis: Axis) -> frozenset[str]:
    return frozenset({axis} if isinstance(axis, str) else axis)


def _check_whole(name: str, x: jax.Array, shape: tuple[int, ...], axis: Axis) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {list(shape)}, that of whole rows (not split over {axis!r}), "
            f"got {list(x.shape)}"
        )
    if _named(axis) & _axes(x):
        raise ValueError(
            f"{name} must be the same on all shards of {axis!r}, got one that varies; hand it to "
            f"jax.shard_map with in_specs that do not name {axis!r}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(axis, q_BTHK, k_BTHK, v_BTHV, log_decay_H, whole_decay_H, initial_BHKV, segment_ids_BT):
    """Out and final state; `whole_decay_H` is `log_decay_H` that does not vary over the axis.

    With it the states at borders are combined, for the final one must not vary either. The
    gradient of the decays goes to the other one.
    """
    arrays = q_BTHK, k_BTHK, v_BTHV, log_decay_H, whole_decay_H, initial_BHKV, segment_ids_BT
    return _forward(axis, *arrays)[0]


def _forward(
    axis, q_BTHK, k_BTHK, v_BTHV, log_decay_H, whole_decay_H, initial_BHKV, segment_ids_BT
):
    place = _locate(axis, q_BTHK.shape[1], segment_ids_BT)
    written_BHKV = lightning_state(k_BTHK, v_BTHV, log_decay_H, segment_ids=place.segment_ids_BT)
    written_NBHKV = jax.lax.all_gather(written_BHKV, axis, to="invarying")
    ends_N = jnp.arange(1, place.num_shards + 1, dtype=jnp.int32)

    def state_at(border):
        """What the shards before it have written, and what was there before the row."""
        decay_1bH = place.borders.decay(whole_decay_H, 0, border)
        decay_NbH = place.borders.decay(whole_decay_H, ends_N, border)
        return _sum(decay_1bH, initial_BHKV[None]) + _sum(decay_NbH, written_NBHKV)

    state_BHKV = checkpoint_name(place.reach(state_at(place.shard)), remat.STATE)
    out_BTHV, _ = pallas_kernels.lightning_attention(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state=state_BHKV,
        segment_ids=place.segment_ids_BT,
    )  # fmt: skip
    residuals = q_BTHK, k_BTHK, v_BTHV, log_decay_H, whole_decay_H, state_BHKV, segment_ids_BT
    return (out_BTHV, state_at(place.num_shards)), residuals


def _backward(axis, residuals, cotangents):
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, whole_decay_H, state_BHKV, segment_ids_BT = residuals
    dout_BTHV, dfinal_BHKV = cotangents
    place = _locate(axis, q_BTHK.shape[1], segment_ids_BT)
    read_BHKV = place.reach(
        lightning_state_gradient(q_BTHK, dout_BTHV, log_decay_H, segment_ids=place.segment_ids_BT)
    )
    read_NBHKV = jax.lax.all_gather(read_BHKV, axis, to="invarying")
    starts_N = jnp.arange(place.num_shards, dtype=jnp.int32)

    def dstate_at(border):
        """What the shards after it have read, and what is asked of the state after the row."""
        decay_NbH = place.borders.decay(whole_decay_H, border, starts_N)
        decay_1bH = place.borders.decay(whole_decay_H, border, place.num_shards)
        return _sum(decay_1bH, dfinal_BHKV[None]) + _sum(decay_NbH, read_NBHKV)

    # With the right states at both ends, the op's own gradient is that of the whole row; also for
    # the decays, each shard for its own tokens.
    _, pullback = jax.vjp(
        lambda *arrays: pallas_kernels.lightning_attention(
            *arrays, initial_state=state_BHKV, segment_ids=place.segment_ids_BT
        ),
        q_BTHK, k_BTHK, v_BTHV, log_decay_H,
    )  # fmt: skip
    gradients = pullback((dout_BTHV, dstate_at(place.shard + 1)))
    return *gradients, None, dstate_at(0), None


_attend.defvjp(_forward, _backward)


class _Place(NamedTuple):
    """Where this shard lies in its row."""

    shard: jax.Array
    num_shards: int
    borders: borders.Borders
    segment_ids_BT: jax.Array | None
    """Of this shard's tokens."""

    def reach(self, state_BHKV: jax.Array) -> jax.Array:
        """The state, where the shard's first document goes on with it; else zeros."""
        is_continued_b1 = jax.lax.dynamic_slice_in_dim(
            self.borders.is_continued_bN, self.shard, 1, axis=1
        )
        return jnp.where(is_continued_b1[:, :, None, None], state_BHKV, 0.0)


def _locate(axis, length, segment_ids_BT) -> _Place:
    shard, num_shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    if segment_ids_BT is None:
        return _Place(shard, num_shards, borders.without_segments(num_shards, length), None)
    ids_BNT = segment_ids_BT.reshape(-1, num_shards, length)
    ids_BT = jax.lax.dynamic_slice_in_dim(segment_ids_BT, shard * length, length, axis=1)
    return _Place(shard, num_shards, borders.locate(ids_BNT), ids_BT)


def _sum(decay_NbH, states_NBHKV):
    return (decay_NbH[..., None, None] * states_NBHKV).sum(axis=0)
