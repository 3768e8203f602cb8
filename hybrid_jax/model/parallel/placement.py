"""Where the arrays of one pass through the model live: a mesh, and the rules that split dims."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

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

    @property
    def platform(self) -> str:
        """Of the devices: "tpu", "gpu" or "cpu"."""
        return self.mesh.devices.flat[0].platform

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

    def parameter(self, name: str, axes, shape) -> NamedSharding:
        """Where a parameter is stored, its gradient and its moments with it."""
        return NamedSharding(self.mesh, self.rules.parameter(axes, shape, self.shape, name))

    def gather(self, params):
        """A layer's tree of `nnx.Variable` as it computes: what storage alone splits is whole."""

        def one(path, param: nnx.Variable):
            axes, value = param.get_metadata()["axes"], param[...]
            name = jax.tree_util.keystr(path)
            used = self.rules.used_parameter(axes, value.shape, self.shape, name)
            at_rest = self.parameter(name, axes, value.shape)
            return param.replace(_moved(NamedSharding(self.mesh, used), at_rest, value))

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(used: NamedSharding, at_rest: NamedSharding, value):
    """A parameter as a layer uses it; its gradient goes straight to where the parameter rests.

    JAX's own rule would have the gradient whole first: summed over devices twice as expensively,
    and held by all.
    """
    return jax.lax.with_sharding_constraint(value, used)


def _moved_fwd(used, at_rest, value):
    return _moved(used, at_rest, value), None


def _moved_bwd(used, at_rest, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, at_rest),)


_moved.defvjp(_moved_fwd, _moved_bwd)


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
