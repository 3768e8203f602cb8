"""How long a collective takes on the links of a target: bytes over bandwidth, no latency.

Rings and lines of a torus, all dims of a group at once; what a group does not span, it does not
use. The formulas are those of bidirectional rings (https://jax-ml.github.io/scaling-book/sharding):
an all-gather of V bytes over one dim takes V / W, W being both directions of a link together.
"""

import dataclasses
import math
from collections.abc import Sequence

from hybrid_jax.targets.chips import Chip
from hybrid_jax.targets.links import LINKS


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a group of devices spans: chips along each torus dim, and whether that is a ring."""

    sizes: tuple[int, ...]
    """Devices of the group along each dim that it spans."""
    rings: tuple[bool, ...]
    dims: tuple[int, ...]
    """Which dims these are; collectives on the same dims wait for each other."""
    slices: int = 1
    """Slices of the group, joined by the data-centre network."""

    @property
    def devices(self) -> int:
        return math.prod(self.sizes) * self.slices


class Network:
    """The links between the devices of a program, in the program's order."""

    def __init__(self, chip: Chip, devices: Sequence):
        self._links = LINKS[chip.name]
        self._chip = chip
        self._places = [self._place(device, n) for n, device in enumerate(devices)]
        self._bounds = tuple(max(at) + 1 for at in zip(*(place for _, place in self._places)))

    def __len__(self):
        return len(self._places)

    def _place(self, device, number: int) -> tuple[int, tuple[int, ...]]:
        """(slice, coordinates); devices of one chip stand side by side in one more dim."""
        if not self._links.torus_dims:
            return 0, (number,)
        coords = tuple(device.coords)[: self._links.torus_dims]
        core = (device.core_on_chip,) if self._chip.devices > 1 else ()
        return getattr(device, "slice_index", 0) or 0, (*coords, *core)

    def reach(self, group: Sequence[int]) -> Reach:
        """What the devices of one group (by their number in the program) span."""
        places = [self._places[number] for number in group]
        slices = len({which for which, _ in places})
        if not self._links.torus_dims:
            return Reach((len(group),), (True,), (0,))
        spans = [len(set(column)) for column in zip(*(place for _, place in places))]
        dims = [dim for dim, size in enumerate(spans) if size > 1]
        rings = tuple(
            spans[dim] == self._bounds[dim] and spans[dim] % self._links.wraps_at == 0
            for dim in dims
        )
        return Reach(tuple(spans[dim] for dim in dims), rings, tuple(dims), slices)

    def seconds(self, kind: str, size: int, reach: Reach) -> float:
        """Time of one collective in which each device of the group has `size` bytes.

        `size` is the larger of what a device gives and what it gets; of an exchange or a permute
        what it sends. A kind that is not known is taken as an all-gather.
        """
        if reach.devices == 1:
            return 0.0
        factor = 2 if kind == "all-reduce" else 1
        if not self._links.torus_dims:
            moved = size * (1 if kind == "collective-permute" else 1 - 1 / reach.devices)
            return factor * moved / self._links.link_bytes_per_second
        return factor * (self._inside(kind, size, reach) + self._across(kind, size, reach))

    def _inside(self, kind: str, size: int, reach: Reach) -> float:
        if not reach.sizes:
            return 0.0
        one_way = self._links.link_bytes_per_second
        # A line's links carry everything one way; a ring's half of it each way.
        widths = [one_way * (2 if ring else 1) for ring in reach.rings]
        if kind == "collective-permute":
            return size / one_way
        if kind == "all-to-all":
            hops = [n / 4 if ring else n / 2 for n, ring in zip(reach.sizes, reach.rings)]
            return max(size * hop / (2 * one_way) for hop in hops)
        return size * (1 - 1 / math.prod(reach.sizes)) / sum(widths)

    def _across(self, kind: str, size: int, reach: Reach) -> float:
        """Between slices: each device sends its part of what the others do not have."""
        if reach.slices == 1:
            return 0.0
        own = size if kind == "all-to-all" else size / math.prod(reach.sizes)
        return own * (1 - 1 / reach.slices) / self._links.network_bytes_per_second
