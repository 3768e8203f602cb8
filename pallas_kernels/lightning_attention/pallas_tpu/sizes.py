"""How many tokens a chunk has and how many chunks a grid step does, by TPU generation."""

from typing import NamedTuple

import jax


class Size(NamedTuple):
    """Of one pass."""

    chunk: int
    block_chunks: int


class Sizes(NamedTuple):
    """Of one call."""

    forward: Size
    backward: Size


# Schedules of libtpu 0.0.42, B1 H64 T131072 D128 bfloat16. Chunks of 128 fill the matrix units of
# 128 and keep the C x C work of those of 256 small. Larger blocks spread a grid step's fixed cost,
# some 100 cycles, over more chunks; beyond these it is below a fiftieth.
_SMALL = Sizes(forward=Size(128, 4), backward=Size(128, 2))  # within the 16 MiB of VMEM of v4
_LARGE = Sizes(forward=Size(128, 4), backward=Size(128, 4))
BY_DEVICE_KIND = {
    "TPU v4": _SMALL,
    "TPU v5": _SMALL,
    "TPU v5 lite": _SMALL,
    "TPU v6 lite": _LARGE,
    "TPU7x": _LARGE,
}


def choose(chosen: Sizes | None) -> Sizes:
    """The caller's choice, or that of the generation, or one that every generation can run.

    The generation is known where a mesh is set (`jax.set_mesh`); the numbers are the same anyhow.
    """
    if chosen is not None:
        return chosen
    device = jax.sharding.get_abstract_mesh().abstract_device
    return BY_DEVICE_KIND.get(device.device_kind, _SMALL) if device is not None else _SMALL
