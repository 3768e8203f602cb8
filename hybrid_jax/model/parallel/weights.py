"""Weights that are stored in parts, inside `jax.shard_map`: whole while they are used."""

import functools

import jax
from jax import lax
from jax.sharding import PartitionSpec

from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical


def spec(placement: Placement, shape: tuple[int, ...], *axes: Logical) -> PartitionSpec:
    """How `jax.shard_map` takes a weight of this shape that `whole` then is given: as it rests."""
    at_rest = placement.parameter("a weight", axes, shape).spec
    entries = [*at_rest, *[None] * (len(axes) - len(at_rest))]
    parts = _parts(placement, axes) or None
    return PartitionSpec(
        *(parts if logical is Logical.MODEL else entry for logical, entry in zip(axes, entries))
    )


def whole(placement: Placement, weight: jax.Array, *axes: Logical, dtype=None) -> jax.Array:
    """This device's part of a weight as it is used, in the dtype it is used in.

    Its gradient is summed over the devices that hold other tokens, in the weight's own dtype, and
    each gets the part that it stores: XLA makes that of a sum over whole weights only where it can
    see both, and would let every device hold all of it.
    """
    dtype = weight.dtype if dtype is None else dtype
    # What copies of a part have for it is summed after the parts are dealt out.
    missing = set(placement.token_axes) - set(jax.typeof(weight).manual_axis_type.varying)
    weight = lax.pcast(weight, tuple(missing), to="varying") if missing else weight
    parts = _parts(placement, axes)
    if not parts:
        return weight.astype(dtype)
    return _gather(parts, axes.index(Logical.MODEL), dtype, weight.dtype, weight)


def _parts(placement: Placement, axes: tuple[Logical, ...]) -> tuple[str, ...]:
    """Mesh axes that split MODEL at rest and tokens in use, and no other dim of the weight."""
    used = {axis for logical in axes for axis in placement.axes_of(logical)}
    stored = placement.rules.stored_over(axes, Logical.MODEL)
    return tuple(axis for axis in stored if axis in placement.token_axes and axis not in used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(axes: tuple[str, ...], dim: int, dtype, stored_dtype, weight):
    return lax.all_gather(weight.astype(dtype), axes, axis=dim, tiled=True)


def _gather_fwd(axes, dim, dtype, stored_dtype, weight):
    return lax.all_gather(weight.astype(dtype), axes, axis=dim, tiled=True), None


def _gather_bwd(axes, dim, dtype, stored_dtype, residuals, dweight):
    dweight = dweight.astype(stored_dtype)
    return (lax.psum_scatter(dweight, axes, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_fwd, _gather_bwd)
