"""The device mesh: five named axes, whose sizes multiply to the number of devices."""

import dataclasses
import difflib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""From the slowest links to the fastest: neighbours along the last axis are neighbours on chips."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each axis has."""

    data: int = 1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: int = 1
    """Parts of every parameter; devices along it have rows of their own too."""
    expert: int = 1
    """Groups of experts; tokens travel to them."""
    sequence: int = 1
    """Parts of every row, in order of time."""
    tensor: int = 1
    """Parts of heads, feed-forwards and vocabulary."""
    slices: int = 1
    """Slices that only a data-centre network joins (DCN); they divide the `data` axis."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"mesh axis {field.name} must be a whole number >= 1; got {size!r}."
                )
        if self.data % self.slices:
            raise ValueError(
                f"mesh axis data={self.data} does not divide into slices={self.slices}: only data "
                "crosses slices, so each must hold the same number of copies."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, in the order of the mesh."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """The product of all axes."""
        return math.prod(self.sizes.values())

    def __str__(self):
        parts = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        if self.slices > 1:
            parts.append(f"slices={self.slices}")
        return ",".join(parts) or "data=1"


def parse(text: str, devices: int | None = None) -> MeshShape:
    """The shape that 'data=2,fsdp=4' means; axes that are not named have size 1.

    One axis may be -1: what is left of `devices`. ValueError for an unknown axis, one that is named
    twice, a size that is no number, and sizes that do not multiply to `devices` if that is given.
    """
    known = (*AXES, "slices")
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in known:
            near = difflib.get_close_matches(axis, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"mesh {text!r} names the axis {axis!r}; expected {', '.join(known)}.{hint}"
            )
        if axis in sizes:
            raise ValueError(f"mesh {text!r} names the axis {axis!r} twice.")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ValueError(
                f"mesh {text!r} gives {axis} the size {size!r}; expected a whole number, as in "
                "'data=2,fsdp=4', or -1 for what is left of the devices."
            ) from None
    return _filled(text, sizes, devices)


def _filled(text: str, sizes: dict[str, int], devices: int | None) -> MeshShape:
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if open_axes:
        if devices is None or len(open_axes) > 1 or "slices" in open_axes:
            unknown, many = "the number of devices is not known", "only one axis may be"
            why = unknown if devices is None else many
            raise ValueError(f"mesh {text!r} has {' and '.join(open_axes)} of size -1; {why}.")
        rest = math.prod(size for axis, size in sizes.items() if axis in AXES and size != -1)
        if rest < 1 or devices % rest:
            raise ValueError(
                f"mesh {text!r} leaves {devices} / {rest} devices for {open_axes[0]}, which is no "
                "whole number."
            )
        sizes = sizes | {open_axes[0]: devices // rest}
    shape = MeshShape(**sizes)
    if devices is not None:
        check_devices(shape, devices)
    return shape


def check_devices(shape: MeshShape, devices: int) -> None:
    """ValueError unless the axes multiply to this many devices."""
    if shape.devices != devices:
        product = " x ".join(f"{axis}={size}" for axis, size in shape.sizes.items())
        raise ValueError(
            f"a mesh of {product} has {shape.devices} devices; there are {devices}. Change a size, "
            "or give one axis -1 to take what is left."
        )


def make(shape: MeshShape, devices: Sequence | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all of them if None), laid out for the chips' links.

    On TPUs neighbours on an axis are neighbours on the torus where that is possible, and `data`
    crosses slices; elsewhere devices come in their order. ValueError if the number is wrong.
    """
    devices = list(jax.devices() if devices is None else devices)
    check_devices(shape, len(devices))
    sizes = tuple(shape.sizes.values())
    if devices[0].platform != "tpu":
        grid = np.asarray(devices, dtype=object).reshape(sizes)
    elif shape.slices > 1:
        inner = (shape.data // shape.slices, *sizes[1:])
        across = (shape.slices, *(1 for _ in sizes[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(inner, across, devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(grid, AXES, axis_types=axis_types)
