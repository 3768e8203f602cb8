"""Parameters straight into the memory of the devices that hold them, part by part."""

import functools
import typing
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.checkpoint import parts
from hybrid_jax.checkpoint.boxes import Box, hull
from hybrid_jax.checkpoint.formats import protocol

if typing.TYPE_CHECKING:
    from hybrid_jax.checkpoint.opened import Checkpoint

# What the devices of this process hold of one parameter is put together on the host up to this
# size: one transfer, and no program to compile. Beyond, pieces go to the devices as they come.
HOST_BYTES = 1 << 26


def load(
    checkpoint: "Checkpoint",
    leaf: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    *,
    check_finite: bool = True,
    seen: Callable[[Box, np.ndarray], None] | None = None,
) -> jax.Array:
    """One parameter, of which this process reads what its own devices hold, and that once.

    `seen` is shown every part with its place in the parameter; of what several processes hold, in
    one of them. As `deal` has it for memory. Raises ValueError as `parts.read` does.
    """
    dtype = np.dtype(dtype)
    mine = _mine(shape, sharding) if seen is not None else frozenset()

    def read(part: Box) -> Iterator[tuple[Box, np.ndarray]]:
        for place, values in parts.read(checkpoint, leaf, part, dtype, check_finite=check_finite):
            for box in mine:
                common = box.meet(place)
                if seen is not None and common is not None:
                    seen(common, values[common.within(place).slices])
            yield place, values

    # Without ranges two boxes that share a tensor would read it twice.
    has_ranges = isinstance(checkpoint.source, protocol.RangedSource)
    return deal(read, shape, dtype, sharding, at_once=not has_ranges)


def deal(
    read: Callable[[Box], Iterable[tuple[Box, np.ndarray]]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    *,
    at_once: bool,
) -> jax.Array:
    """An array on devices, of pieces of it: `read(part)` gives all of a part with their places.

    `at_once`: one part that holds all that the devices of this process do; else as many as that
    needs and no value too many. Without a sharding it is on the default device, whence JAX moves it
    to where it is used. Host memory is that of a few pieces, whatever the size of the array; a
    device needs room for its part of it and one piece.
    """
    devices = _devices(shape, sharding)
    arrays: list[jax.Array] = []
    groups = [(hull(devices), list(devices))] if at_once else _groups(devices)
    for part, boxes in groups:
        on_host = part.size * dtype.itemsize <= HOST_BYTES
        kind = _OnHost if on_host else _OnDevices
        shards = [kind(box, dtype, devices[box]) for box in boxes]
        filled = 0
        for place, values in read(part):
            filled += values.size
            for shard in shards:
                common = shard.box.meet(place)
                if common is not None:
                    shard.put(common, values[common.within(place).slices])
        assert filled == part.size, f"{filled} of {part.size} values of an array {shape}"
        arrays += [array for shard in shards for array in shard.finish()]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _devices(shape, sharding) -> dict[Box, list[jax.Device | None]]:
    """What this process holds, and where."""
    if sharding is None:
        return {Box.whole(shape): [None]}
    devices: dict[Box, list[jax.Device | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(Box.of(index or (), shape), []).append(device)
    return devices


def _mine(shape, sharding) -> frozenset[Box]:
    """Of the parts of a parameter, those whose first holder is of this process."""
    if sharding is None:
        return frozenset([Box.whole(shape)])
    first: dict[Box, jax.Device] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        first.setdefault(Box.of(index or (), shape), device)
    me = jax.process_index()
    return frozenset(box for box, device in first.items() if device.process_index == me)


def _groups(boxes: Iterable[Box]) -> list[tuple[Box, list[Box]]]:
    """What to read at once, and which boxes are cut out of it.

    All of them, if they fill the box around them: a tensor that several devices share is then read
    once. Boxes of a sharding are equal or apart.
    """
    boxes = list(boxes)
    around = hull(boxes)
    if sum(box.size for box in boxes) == around.size:
        return [(around, boxes)]
    return [(box, [box]) for box in boxes]


class _OnHost:
    """A shard that goes to its devices when it is complete."""

    def __init__(self, box: Box, dtype: np.dtype, devices: list[jax.Device | None]):
        self.box = box
        self._devices = devices
        self._array = np.empty(box.shape, dtype)

    def put(self, place: Box, values: np.ndarray) -> None:
        """Values of this shard; `place` counts in the whole parameter."""
        self._array[place.within(self.box).slices] = values

    def finish(self) -> list[jax.Array]:
        """The shard on each device."""
        return [jax.device_put(self._array, device) for device in self._devices]


class _OnDevices:
    """A shard that is on its devices from the beginning."""

    def __init__(self, box: Box, dtype: np.dtype, devices: list[jax.Device | None]):
        self.box = box
        self._arrays = [_zeros(box.shape, dtype, device) for device in devices]

    def put(self, place: Box, values: np.ndarray) -> None:
        """Values of this shard; `place` counts in the whole parameter."""
        begin = np.asarray(place.within(self.box).begin, np.int32)
        values = np.ascontiguousarray(values)
        self._arrays = [_updated(array, values, begin) for array in self._arrays]
        # Or transfers would queue up, and what they read from with them.
        jax.block_until_ready(self._arrays)

    def finish(self) -> list[jax.Array]:
        """The shard on each device."""
        return self._arrays


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | None) -> jax.Array:
    # Made where it stays: `jnp.zeros(device=...)` makes it on the default device, and copies it.
    where = None if device is None else jax.sharding.SingleDeviceSharding(device)
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=where)()


@functools.partial(jax.jit, donate_argnums=0)
def _updated(array, values, begin):
    return jax.lax.dynamic_update_slice(array, values, tuple(begin))
