"""Where the arrays of one pass through the model live: a mesh, and the rules that split dims."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.model.params import logical_axes
from sharding import Logical, MeshShape, Rules, mesh, rules

ROWS = (Logical.BATCH, Logical.TIME)
"""What the first two dims of every activation mean; the others follow."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with rules; given to the model, which otherwise computes on one device."""

    mesh: jax.sharding.Mesh
    rules: Rules

    @functools.cached_property
    def shape(self) -> MeshShape:
        """Size of each axis."""
        return MeshShape(**dict(self.mesh.shape))

    def axes_of(self, logical: Logical) -> tuple[str, ...]:
        """Mesh axes that split an activation's dim, those of one device too."""
        return self.rules.activations.get(logical, ())

    def spec(self, *axes: Logical | None) -> PartitionSpec:
        """How dims of an activation are split; None is a dim that never is."""
        parts = [() if logical is None else self.axes_of(logical) for logical in axes]
        return PartitionSpec(*(part or None for part in parts))

    def sharding(self, *axes: Logical | None) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x, *axes: Logical | None):
        """Tell the compiler where an activation lives."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def activation(self, name: str, axes, shape) -> NamedSharding:
        """`sharding` of an array of this shape; ValueError if a dim of it does not divide."""
        return NamedSharding(self.mesh, self.rules.activation(axes, shape, self.shape, name))

    def for_decoding(self, num_rows: int) -> "Placement":
        """The placement of so many rows with a decode state; they need not divide over devices.

        Mesh axes of the rules that would not split them evenly split no rows: their devices hold
        the same ones. The first axes go first, so 4 rows on data=2,expert=4 are split in two.
        ValueError for rules that gather parameters, or split rows in time: every token would pay
        for it.
        """
        for table, logical, what in (
            (self.rules.parameters, Logical.MODEL, "keep parameters in parts"),
            (self.rules.experts, Logical.MODEL, "keep experts in parts"),
            (self.rules.activations, Logical.TIME, "split rows in time"),
        ):
            used = [axis for axis in table.get(logical, ()) if self.shape.sizes[axis] > 1]
            if used:
                split = ", ".join(f"{axis}={self.shape.sizes[axis]}" for axis in used)
                raise ValueError(
                    f"The rules {self.rules.name!r} {what} over {split}, which decoding would "
                    "bring together for every token; use the rules 'serve', or a mesh without "
                    "that axis."
                )
        axes, count = self.axes_of(Logical.BATCH), 1
        kept: tuple[str, ...] = ()
        for axis in axes:
            if num_rows % (count * self.shape.sizes[axis]) == 0:
                count *= self.shape.sizes[axis]
                kept += (axis,)
        return self if kept == axes else _with_rows_over(self, kept)

    def parameter(self, name: str, axes, shape) -> NamedSharding:
        """Where a parameter is stored, its gradient and its moments with it."""
        return NamedSharding(self.mesh, self.rules.parameter(axes, shape, self.shape, name))

    def stored(self, params):
        """`parameter` of every `nnx.Variable` of a tree: the same tree with shardings in it."""

        def one(path, param: nnx.Param):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return param.replace(self.parameter(name, logical_axes(param), param.shape))

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)

    def place(self, params):
        """The same tree on the devices of the mesh, each array as `stored` says."""
        return jax.tree.map(jax.device_put, params, self.stored(params))

    def gather(self, params):
        """A layer's tree of `nnx.Variable` as it computes: what storage alone splits is whole."""

        def one(path, param: nnx.Variable):
            axes, value = param.get_metadata()["axes"], param[...]
            name = jax.tree_util.keystr(path)
            spec = self.rules.used_parameter(axes, value.shape, self.shape, name)
            value = jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, spec))
            return param.replace(value)

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)


@functools.lru_cache
def _with_rows_over(placement: Placement, axes: tuple[str, ...]) -> Placement:
    """One object for equal arguments: rules are compared by identity in compiled programs."""
    activations = placement.rules.activations | {Logical.BATCH: axes}
    return dataclasses.replace(
        placement, rules=dataclasses.replace(placement.rules, activations=activations)
    )


def make(mesh_text: str, rules_name: str, devices=None) -> Placement:
    """From what a user types; ValueError for what does not multiply out or is not known."""
    devices = jax.devices() if devices is None else devices
    shape, chosen = mesh.parse(mesh_text, len(devices)), rules.get(rules_name)
    idle = [axis for axis, size in shape.sizes.items() if size > 1 and axis not in chosen.axes]
    if idle:
        raise ValueError(
            f"The rules {rules_name!r} split nothing over {', '.join(idle)}: devices of the mesh "
            f"{mesh_text!r} would do the same work; use other rules, or leave the axis out."
        )
    return Placement(mesh.make(shape, devices), chosen)
