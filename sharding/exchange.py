"""Rows of tokens move to the devices that own their experts, and back; inside `jax.shard_map`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axis = str | tuple[str, ...]

# Words side by side in a row of a TPU's tile, which has eight.
_LANES = 128


class Routes(NamedTuple):
    """Which slice of rows goes where, by sender, receiver and slice; the same on every device.

    No two slices of a sender overlap, nor do two of a receiver.
    """

    first_PPJ: jax.Array
    """int32: the row of the sender at which a slice begins."""
    place_PPJ: jax.Array
    """int32: the row of the receiver at which it will begin."""
    rows_PPJ: jax.Array
    """int32: its length."""

    def back(self) -> "Routes":
        """The same slices from where they are now to where they came from."""
        first, place, rows = (jnp.swapaxes(array, 0, 1) for array in self)
        return Routes(first_PPJ=place, place_PPJ=first, rows_PPJ=rows)


def expert_routes(counts_PE: jax.Array, kept_PE: jax.Array | None = None) -> Routes:
    """Routes of rows in expert order to the experts' devices, where they stand in that order too.

    Device p owns the p-th part of the experts. There the rows of an expert stand by sender, then as
    they did at the sender: that is the order of all tokens if senders are numbered by tokens.

    Args:
      counts_PE: int32, how many rows each device has for each expert.
      kept_PE: how many of these travel, the first ones; None for all. The others leave no gap.

    Raises:
      ValueError: the experts do not divide over the devices.
    """
    P, E = counts_PE.shape
    if E % P:
        raise ValueError(
            f"expert_routes needs experts that divide over the devices of the axis, got {E} "
            f"experts and {P} devices; choose a mesh whose expert axis divides {E}"
        )
    J = E // P
    kept_PE = counts_PE if kept_PE is None else kept_PE
    first_PE = jnp.cumsum(counts_PE, axis=1) - counts_PE
    rows_PPJ = kept_PE.reshape(P, P, J)
    # By receiver; there by expert, then sender.
    arriving_PX = rows_PPJ.transpose(1, 2, 0).reshape(P, J * P)
    place_PJP = (jnp.cumsum(arriving_PX, axis=1) - arriving_PX).reshape(P, J, P)
    return Routes(first_PE.reshape(P, P, J), place_PJP.transpose(2, 0, 1), rows_PPJ)


def exchange_rows(
    x_RD: jax.Array, routes: Routes, num_rows: int, axis: Axis, *, platform: str | None = None
) -> jax.Array:
    """What arrives at this device when every device of the axis sends its slices: out_RD.

    A program for TPU or CUDA holds `ragged_all_to_all`; any other gathers all rows and picks the
    same ones. The gradient, for x, is the exchange back.

    Args:
      x_RD: any rows; those in no slice stay behind.
      routes: alike on all devices of the axis. A slice that would end after `num_rows` at its
        receiver is the caller's fault, and what happens then is not defined.
      num_rows: rows of the result. Those that nothing arrives at are zero.
      axis: mesh axis, or axes with the major one first, over which devices are numbered.
      platform: of the mesh's devices ("tpu", "gpu", "cpu"), if the caller knows it. Left to the
        compiler, the choice can stay a branch of the program, behind which nothing overlaps.

    Raises:
      ValueError: routes for another number of devices.
    """
    P = lax.axis_size(axis)
    if routes.rows_PPJ.shape[:2] != (P, P):
        raise ValueError(
            f"exchange_rows needs routes [{P}, {P}, slices] for the {P} devices of axis {axis!r}, "
            f"got {routes.rows_PPJ.shape}"
        )
    x_RD, *arrays = _vary_alike(axis, x_RD, *routes)
    return _exchange((x_RD.shape[0], num_rows), axis, platform, x_RD, Routes(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(num_rows: tuple[int, int], axis: Axis, platform, x_RD, routes: Routes):
    """`num_rows` are those here and those of the result."""

    def branch(function):
        return lambda x_RD, *arrays: function(x_RD, Routes(*arrays), num_rows[1], axis)

    branches = {
        "tpu": branch(_ragged_words_to_all), "cuda": branch(_ragged_all_to_all),
        "default": branch(_gather_and_pick),
    }  # fmt: skip
    if platform is not None:
        name = {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda"}.get(platform, "default")
        return branches[name](x_RD, *routes)
    # By the platform compiled for, not by this machine's; what is not taken is not compiled.
    return lax.platform_dependent(x_RD, *routes, **branches)


def _exchange_fwd(num_rows, axis, platform, x_RD, routes):
    return _exchange(num_rows, axis, platform, x_RD, routes), routes


def _exchange_bwd(num_rows, axis, platform, routes, dout_RD):
    # JAX would keep residuals of both branches; its own rule needs a second mask, for the output.
    return _exchange(num_rows[::-1], axis, platform, dout_RD, routes.back()), None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _ragged_all_to_all(x_RD, routes: Routes, num_rows: int, axis: Axis):
    out_RD = _move(x_RD, routes, num_rows, axis)
    return jnp.where(_arrives(routes, num_rows, axis)[:, None], out_RD, 0)


def _ragged_words_to_all(x_RD, routes: Routes, num_rows: int, axis: Axis):
    """The same with two numbers of 16 bits as one word of 32.

    Rows of 16 bits lie in pairs in a TPU's memory, so XLA would cut each in two to move them one by
    one, and put them together again.
    """
    R, D = x_RD.shape
    if x_RD.dtype.itemsize != 2 or D % 2:
        return _ragged_all_to_all(x_RD, routes, num_rows, axis)
    # Columns far apart share a word: halves are read without a shuffle of lanes.
    low_RC, high_RC = (
        lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)
        for half in jnp.split(x_RD, 2, axis=1)
    )
    words_RC = low_RC | (high_RC << 16)
    # A row of whole tiles moves as it lies; of a single line of words XLA makes a tile each.
    C = words_RC.shape[1]
    tiles = (C // _LANES, _LANES) if C % (8 * _LANES) == 0 else (C,)
    out_RC = _move(words_RC.reshape(R, *tiles), routes, num_rows, axis).reshape(num_rows, C)
    out_RC = jnp.where(_arrives(routes, num_rows, axis)[:, None], out_RC, 0)
    halves = (out_RC & 0xFFFF, out_RC >> 16)
    return jnp.concatenate(
        [lax.bitcast_convert_type(half.astype(jnp.uint16), x_RD.dtype) for half in halves], axis=1
    )


def _move(x_RD, routes: Routes, num_rows: int, axis: Axis):
    """The collective; rows that nothing arrives at hold anything.

    On a TPU the collective's own layout is slow to fill: zeros took 21 ms for 131072 rows of 6144
    (v5p), where a mask costs nothing beside the copy out of that layout.
    """
    me = lax.axis_index(axis)
    first_X, place_X, sent_X = (array[me].reshape(-1) for array in routes)
    received_X = routes.rows_PPJ[:, me].reshape(-1)
    anything_RD = _like_rows(lax.empty((num_rows, *x_RD.shape[1:]), x_RD.dtype), x_RD)
    return lax.ragged_all_to_all(
        x_RD, anything_RD, first_X, sent_X, place_X, received_X, axis_name=axis
    )


def _arrives(routes: Routes, num_rows: int, axis: Axis):
    """Which rows of the result something arrives at, bool [num_rows]."""
    me = lax.axis_index(axis)
    begin_X, rows_X = (x[:, me].reshape(-1) for x in (routes.place_PPJ, routes.rows_PPJ))
    # One more slice lies over a row from where it begins to where it ends.
    change_R = jnp.zeros((num_rows + 1,), jnp.int32)
    change_R = _like_rows(change_R, begin_X)
    change_R = change_R.at[begin_X].add(1, mode="drop").at[begin_X + rows_X].add(-1, mode="drop")
    return jnp.cumsum(change_R[:num_rows]) > 0


def _gather_and_pick(x_RD, routes: Routes, num_rows: int, axis: Axis):
    """The exact twin for platforms without the collective."""
    me = lax.axis_index(axis)
    R = x_RD.shape[0]
    if R == 0:
        return _like_rows(jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype), x_RD)
    first_X, place_X, rows_X = (array[:, me].reshape(-1) for array in routes)
    sender_X = jnp.arange(first_X.size, dtype=jnp.int32) // routes.rows_PPJ.shape[2]
    # An empty slice begins where the next one does: past the end it is never found.
    begin_X = jnp.where(rows_X > 0, place_X, num_rows)
    order_X = jnp.argsort(begin_X)
    out_R = jnp.arange(num_rows, dtype=jnp.int32)
    found_R = jnp.searchsorted(begin_X[order_X], out_R, side="right").astype(jnp.int32) - 1
    slice_R = order_X[jnp.maximum(found_R, 0)]
    offset_R = out_R - place_X[slice_R]
    arrives_R = (found_R >= 0) & (offset_R < rows_X[slice_R])
    from_R = sender_X[slice_R] * R + first_X[slice_R] + offset_R
    every_RD = lax.all_gather(x_RD, axis, tiled=True)
    picked_RD = every_RD[jnp.where(arrives_R, from_R, 0)]
    return jnp.where(arrives_R[:, None], picked_RD, jnp.zeros_like(picked_RD))


def _like_rows(array, x):
    """`array`, varying over the mesh axes that x varies over."""
    varying = jax.typeof(x).manual_axis_type.varying
    return lax.pcast(array, tuple(varying), to="varying") if varying else array


def _vary_alike(axis: Axis, *arrays):
    """Mark arrays as varying over the axis and whatever any of them varies over.

    Without the check of `jax.shard_map` no array says what it varies over, and nothing is marked.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    if not union:
        return arrays
    union |= {axis} if isinstance(axis, str) else set(axis)
    missing = [tuple(union - own) for own in varying]
    return tuple(
        lax.pcast(array, names, to="varying") if names else array
        for array, names in zip(arrays, missing)
    )
