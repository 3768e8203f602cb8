"""Where the arrays of one pass through the model live: a mesh, and the rules that split dims."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.model.parallel.admission import DROPLESS, Capacity
from sharding import Logical, MeshShape, Rules, mesh, rules

ROWS = (Logical.BATCH, Logical.TIME)
"""What the first two dims of every activation mean; the others follow."""


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """How rows travel to experts on other devices."""

    capacity: Capacity = DROPLESS
    """What the experts take; the rest is dropped, and counted in `Routing.load`."""
    token_groups: int = 1
    """Parts that a device's tokens are cut into, so that one may travel while another is
    multiplied; must divide them."""

    def __post_init__(self):
        if not isinstance(self.token_groups, int) or self.token_groups < 1:
            raise ValueError(
                "ExpertOptions.token_groups is a number of groups and must be a whole number >= 1; "
                f"got {self.token_groups!r}."
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with rules; given to the model, which otherwise computes on one device."""

    mesh: jax.sharding.Mesh
    rules: Rules
    experts: ExpertOptions = ExpertOptions()

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

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes that split tokens, those of one device too."""
        return tuple(axis for logical in ROWS for axis in self.axes_of(logical))

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
        """A layer's tree of `nnx.Variable` as it computes: what storage alone splits is whole.

        Not so the weights of experts, which `weights.whole` gathers where they are used.
        """

        def one(path, param: nnx.Variable):
            axes, value = param.get_metadata()["axes"], param[...]
            if Logical.EXPERTS in axes and Logical.FFN in axes:
                return param
            name = jax.tree_util.keystr(path)
            used = self.rules.used_parameter(axes, value.shape, self.shape, name)
            at_rest = self.parameter(name, axes, value.shape)
            # One dim after the other: two at a time XLA gathers as a sum of mostly zeros.
            half = [
                rest if dim is Logical.MODEL else work
                for dim, rest, work in zip(axes, _each(at_rest.spec, axes), _each(used, axes))
            ]
            stops = (PartitionSpec(*half), used)
            shardings = tuple(NamedSharding(self.mesh, stop) for stop in stops)
            return param.replace(_moved(shardings, at_rest, value))

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(stops: tuple[NamedSharding, ...], at_rest: NamedSharding, value):
    """A parameter moved to one place after the other; its gradient goes straight to its rest.

    JAX's own rule would have the gradient whole first: summed over devices twice as expensively,
    and held by all.
    """
    for stop in stops:
        value = jax.lax.with_sharding_constraint(value, stop)
    return value


def _moved_fwd(stops, at_rest, value):
    return _moved(stops, at_rest, value), None


def _moved_bwd(stops, at_rest, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, at_rest),)


_moved.defvjp(_moved_fwd, _moved_bwd)


def _each(spec: PartitionSpec, axes) -> list:
    """The entry of every dim, also of those that the spec leaves out."""
    return [*spec, *[None] * (len(axes) - len(spec))]


def make(
    mesh_text: str, rules_name: str, devices=None, experts: ExpertOptions = ExpertOptions()
) -> Placement:
    """From what a user types; ValueError for what does not multiply out or is not known."""
    devices = jax.devices() if devices is None else devices
    shape, chosen = mesh.parse(mesh_text, len(devices)), rules.get(rules_name)
    idle = [axis for axis, size in shape.sizes.items() if size > 1 and axis not in chosen.axes]
    if idle:
        raise ValueError(
            f"The rules {rules_name!r} split nothing over {', '.join(idle)}: devices of the mesh "
            f"{mesh_text!r} would do the same work; use other rules, or leave the axis out."
        )
    return Placement(mesh.make(shape, devices), chosen, experts)
