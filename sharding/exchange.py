"""Rows of tokens move to the devices that own their experts, and back; inside `jax.shard_map`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding import tpu_rows
from sharding.axes import Axis


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
      axis: mesh axis, or axes in the order of the mesh, over which devices are numbered.
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
    # Zero, which the compiler cannot know: see `tpu_rows.unfilled`.
    zero = jnp.minimum(_received(routes, axis)[0], 0).astype(x_RD.dtype)
    return _move(x_RD, jnp.full((num_rows, x_RD.shape[1]), zero), routes, axis)


def _ragged_words_to_all(
    x_RD, routes: Routes, num_rows: int, axis: Axis, *, interpret: Any = False
):
    """The same on TPUs, for rows of 16 bits as words of 32 in whole tiles."""
    if not tpu_rows.fit(x_RD):
        return _ragged_all_to_all(x_RD, routes, num_rows, axis)
    words_RCL = tpu_rows.pack(x_RD, interpret=interpret)
    shape = num_rows, *words_RCL.shape[1:]
    anything_RCL = tpu_rows.unfilled(
        shape, words_RCL.dtype, _received(routes, axis)[0], interpret=interpret
    )
    there_RCL = _move(words_RCL, anything_RCL, routes, axis)
    arrives_R = _arrives(routes, num_rows, axis)
    return tpu_rows.unpack(there_RCL, arrives_R, x_RD.shape[1], interpret=interpret)


def _move(rows, out, routes: Routes, axis: Axis):
    """The collective, onto `out`."""
    first_X, place_X, sent_X = (array[lax.axis_index(axis)].reshape(-1) for array in routes)
    return lax.ragged_all_to_all(
        rows, _like_rows(out, rows), first_X, sent_X, place_X, _received(routes, axis),
        axis_name=axis,
    )  # fmt: skip


def _received(routes: Routes, axis: Axis):
    """Lengths of the slices that come to this device, by sender."""
    return routes.rows_PPJ[:, lax.axis_index(axis)].reshape(-1)


def _arrives(routes: Routes, num_rows: int, axis: Axis):
    """Which rows of the result something arrives at, bool [num_rows]."""
    begin_X = routes.place_PPJ[:, lax.axis_index(axis)].reshape(-1)
    # One more slice lies over a row from where it begins to where it ends.
    change_R = _like_rows(jnp.zeros((num_rows + 1,), jnp.int32), begin_X)
    change_R = change_R.at[begin_X].add(1, mode="drop")
    change_R = change_R.at[begin_X + _received(routes, axis)].add(-1, mode="drop")
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
    own, wanted = (jax.typeof(each).manual_axis_type.varying for each in (array, x))
    missing = tuple(wanted - own)
    return lax.pcast(array, missing, to="varying") if missing else array


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
