"""Which mesh axes split which dimensions: a table for parameters, one for activations."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from sharding.axes import Logical
from sharding.mesh import MeshShape

Table = dict[Logical, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """Where dimensions live; one that a table does not name is whole on every device."""

    name: str
    about: str
    """A line for people who choose."""
    parameters: Table
    """At rest: parameters, gradients, moments."""
    experts: Table
    """The same for the matrices of experts: they may be split otherwise, and what would split MODEL
    splits their rows, if it divides them, whichever dim these are: parts of rows are gathered as
    they lie, parts of columns have to be put together."""
    activations: Table
    """Batch, time, and what the layers compute."""

    @property
    def axes(self) -> set[str]:
        """Mesh axes that any work is split over."""
        return {axis for split in self.activations.values() for axis in split}

    def parameter(
        self, axes: Sequence[Logical], shape: Sequence[int], mesh: MeshShape, name: str
    ) -> PartitionSpec:
        """Where each dim of a parameter lives.

        Axes that split heads, words or widths at rest only are left out where they do not divide.
        ValueError if a mesh axis would split two of its dims, or a dim does not divide.
        """
        table = dict(self._table(axes))
        for logical, size in zip(axes, shape, strict=True):
            if logical is not Logical.MODEL and logical in table:
                table[logical] = self._dividing(logical, table[logical], size, mesh)
        is_matrix = self._table(axes) is self.experts and Logical.RANK not in axes
        if is_matrix and axes.index(Logical.FFN) < axes.index(Logical.MODEL):
            rows = table.get(Logical.FFN, ()) + table.get(Logical.MODEL, ())
            count = math.prod(mesh.sizes[axis] for axis in rows)
            if shape[axes.index(Logical.FFN)] % count == 0:
                table |= {Logical.FFN: rows, Logical.MODEL: ()}
        return _spec(table, axes, shape, mesh, name)

    def used_parameter(
        self, axes: Sequence[Logical], shape: Sequence[int], mesh: MeshShape, name: str
    ) -> PartitionSpec:
        """Where each dim lives while a layer computes with it."""
        # What does not split the work splits a parameter at rest alone; the residual stream is
        # whole in both tables.
        table = {logical: self.activations.get(logical, ()) for logical in self._table(axes)}
        return _spec(table, axes, shape, mesh, name)

    def activation(
        self, axes: Sequence[Logical | None], shape: Sequence[int], mesh: MeshShape, name: str
    ) -> PartitionSpec:
        """Where each dim of an activation lives; None is a dim that is never split."""
        return _spec(self.activations, axes, shape, mesh, name)

    def _dividing(
        self, logical: Logical, split: tuple[str, ...], size: int, mesh: MeshShape
    ) -> tuple[str, ...]:
        """`split` without the last of the axes that are for storage, until the dim divides."""
        least = len(self.activations.get(logical, ()))
        while len(split) > least and size % math.prod(mesh.sizes[axis] for axis in split):
            split = split[:-1]
        return split

    def _table(self, axes: Sequence[Logical]) -> Table:
        if Logical.EXPERTS in axes and (Logical.FFN in axes or Logical.RANK in axes):
            return self.experts
        return self.parameters


def _spec(table: Table, axes, shape, mesh: MeshShape, name: str) -> PartitionSpec:
    sizes = mesh.sizes
    owner: dict[str, Logical] = {}
    parts: list = []
    for logical, size in zip(axes, shape, strict=True):
        # Axes of size one split nothing; left out, what is printed says what happens.
        used = tuple(axis for axis in table.get(logical, ()) if sizes[axis] > 1)
        for axis in used:
            if axis in owner:
                raise ValueError(
                    f"{name}: the mesh axis {axis!r} would split both {owner[axis].value} and "
                    f"{logical.value}. Choose other rules, or {axis}=1."
                )
            owner[axis] = logical
        count = math.prod(sizes[axis] for axis in used)
        if size % count:
            split = " x ".join(f"{axis}={sizes[axis]}" for axis in used)
            product = f" = {count}" if len(used) > 1 else ""
            raise ValueError(
                f"{name}: its dim {logical.value} of {size} does not divide by {split}{product}. "
                f"Its shape is {tuple(shape)}; choose sizes that divide it, or other rules."
            )
        parts.append(used[0] if len(used) == 1 else used or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


_L = Logical
# Rows of the batch go to all of these; tokens leave them for the experts they choose.
_ACTIVATIONS: Table = {_L.BATCH: ("data", "fsdp", "expert"), _L.EXPERTS: ("expert",)}
_WIDTHS: Table = {_L.HEADS: ("tensor",), _L.KV_HEADS: ("tensor",), _L.FFN: ("tensor",)}
_TENSOR: Table = {_L.VOCAB: ("tensor",), **_WIDTHS}
# At rest over the experts' devices too. Not the residual stream: of 6144 in 512 parts a TPU gathers
# less than a tile of each, and does it as the sum of 512 arrays that are whole and mostly zero.
_SPREAD: Table = _TENSOR | {
    logical: ("tensor", "expert") for logical in (_L.HEADS, _L.FFN, _L.VOCAB)
}
_EXPERT: Table = {_L.EXPERTS: ("expert",), _L.FFN: ("tensor",)}

_ALL = (
    Rules(
        "fsdp",
        "every parameter split over fsdp and gathered layer by layer",
        parameters={_L.MODEL: ("fsdp",)},
        experts={_L.MODEL: ("fsdp",)},
        activations=_ACTIVATIONS,
    ),
    Rules(
        "fsdp_tensor",
        "fsdp, with heads, feed-forwards and vocabulary over tensor",
        parameters={_L.MODEL: ("fsdp",), **_TENSOR},
        experts={_L.MODEL: ("fsdp",), _L.FFN: ("tensor",)},
        activations={**_ACTIVATIONS, **_TENSOR},
    ),
    Rules(
        "expert",
        "fsdp_tensor, with experts over expert: tokens travel to them",
        parameters={_L.MODEL: ("fsdp",), **_SPREAD},
        experts={_L.MODEL: ("fsdp",), **_EXPERT},
        activations={**_ACTIVATIONS, **_TENSOR},
    ),
    Rules(
        "long_context",
        "expert, with every row split over sequence, and parameters too",
        parameters={_L.MODEL: ("fsdp", "sequence"), **_SPREAD},
        experts={_L.MODEL: ("fsdp", "sequence"), **_EXPERT},
        activations={_L.TIME: ("sequence",), **_ACTIVATIONS, **_TENSOR},
    ),
    Rules(
        "long_rows",
        "long_context for few rows: expert splits their time too, not their number",
        parameters={_L.MODEL: ("fsdp", "sequence"), **_SPREAD},
        experts={_L.MODEL: ("fsdp", "sequence"), **_EXPERT},
        activations={
            **_ACTIVATIONS, **_TENSOR,
            _L.BATCH: ("data", "fsdp"), _L.TIME: ("expert", "sequence"),
        },
    ),
    Rules(
        "serve",
        "nothing is gathered: heads over tensor, experts over expert, their width over tensor",
        parameters=_TENSOR,
        experts=_EXPERT,
        activations={**_ACTIVATIONS, **_TENSOR},
    ),
)  # fmt: skip
PRESETS = {rules.name: rules for rules in _ALL}


def get(name: str) -> Rules:
    """A preset; ValueError names the others."""
    if name not in PRESETS:
        raise ValueError(f"There are no rules {name!r}; expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]
