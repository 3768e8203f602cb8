"""Weights that are stored in parts, inside `jax.shard_map`: whole while they are used."""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical


class Stored(NamedTuple):
    """How one weight comes to a device, from `of`; static."""

    split: tuple[tuple[str, ...], ...]
    """Mesh axes that split each dim as `jax.shard_map` takes it: as it rests."""
    dim: int
    parts: tuple[str, ...]
    """Mesh axes that split `dim` at rest and tokens in use, and no dim of the weight in use."""
    token_axes: tuple[str, ...]

    @property
    def spec(self) -> PartitionSpec:
        """`split`, for the `in_specs` of `jax.shard_map`."""
        return PartitionSpec(*(entry or None for entry in self.split))

    def whole(self, weight: jax.Array, dtype=None) -> jax.Array:
        """This device's part of the weight as it is used, in the dtype it is used in.

        Its gradient is summed over the devices that hold other tokens, in the weight's own dtype,
        and each gets the part that it stores: XLA makes that of a sum over whole weights only where
        it can see both, and would let every device hold all of it.
        """
        dtype = weight.dtype if dtype is None else dtype
        # What copies of a part have for it is summed after the parts are dealt out.
        missing = set(self.token_axes) - set(jax.typeof(weight).manual_axis_type.varying)
        weight = lax.pcast(weight, tuple(missing), to="varying") if missing else weight
        if not self.parts:
            return weight.astype(dtype)
        return _gather(self.parts, self.dim, dtype, weight.dtype, weight)


def of(placement: Placement, shape: tuple[int, ...], *axes: Logical) -> Stored:
    """For a weight of this shape, whose dims mean `axes`. Words are used where they rest."""
    at_rest = placement.parameter("a weight", axes, shape).spec
    entries = [*map(_names, at_rest), *[()] * (len(axes) - len(at_rest))]
    dim, parts = 0, tuple[str, ...]()
    for at, (logical, entry) in enumerate(zip(axes, entries)):
        extra = [axis for axis in entry if axis not in placement.axes_of(logical)]
        if extra and logical is not Logical.VOCAB:
            dim, parts = at, tuple(axis for axis in extra if axis in placement.token_axes)
            # What is left splits neither tokens nor work: XLA brings it together before.
            entries[at] = tuple(axis for axis in entry if axis not in extra or axis in parts)
    return Stored(tuple(entries), dim, parts, placement.token_axes)


def _names(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(axes: tuple[str, ...], dim: int, dtype, stored_dtype, weight):
    return lax.all_gather(weight.astype(dtype), axes, axis=dim, tiled=True)


def _gather_fwd(axes, dim, dtype, stored_dtype, weight):
    return lax.all_gather(weight.astype(dtype), axes, axis=dim, tiled=True), None


def _gather_bwd(axes, dim, dtype, stored_dtype, residuals, dweight):
    dweight = dweight.astype(stored_dtype)
    return (lax.psum_scatter(dweight, axes, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_fwd, _gather_bwd)
