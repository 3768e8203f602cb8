"""Where the arrays of one pass through the model live: a mesh, and the rules that split dims."""

import dataclasses
import functools

import jax
import qwix
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.model import lowrank, quantized
from hybrid_jax.model.lowrank import LowRank
from hybrid_jax.model.parallel.admission import DROPLESS, Capacity
from hybrid_jax.model.params import logical_axes
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

    def row_major(self, x):
        """On TPUs: rows of the last dim lie in one piece, as gathers and kernels want them.

        XLA would choose tokens for that, and copy what each layer gathers there and back.
        """
        if self.platform != "tpu":
            return x
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

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
        """`parameter` of every `nnx.Variable` of a tree: the same tree with shardings in it.

        Of quantised weights the scales must divide too: `divisible` sees to it.
        """

        def one(param, at_rest: NamedSharding):
            specs = quantized.split(param.get_raw_value(), at_rest.spec)
            return param.replace(jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs))

        return self._each_parameter(one, params)

    def divisible(self, params):
        """The same tree with scales of quantised weights that divide over the mesh."""

        def one(param, at_rest: NamedSharding):
            return param.replace(quantized.divisible(param.get_raw_value(), at_rest))

        return self._each_parameter(one, params)

    def place(self, params):
        """The same tree on the devices of the mesh, each array as `stored` says."""
        params = self.divisible(params)
        return jax.tree.map(jax.device_put, params, self.stored(params))

    def _each_parameter(self, one, params):
        """`one` of every `nnx.Variable` and where it is stored."""

        def named(path, param: nnx.Param):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return one(param, self.parameter(name, logical_axes(param), param.shape))

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(named, params, is_leaf=is_param)

    def gather(self, params):
        """A layer's tree of `nnx.Variable` as it computes: what storage alone splits is whole.

        Not so the weights of experts, which `weights.whole` gathers where they are used.
        """

        def one(path, param: nnx.Variable):
            axes, value = param.get_metadata()["axes"], param[...]
            if Logical.EXPERTS in axes and Logical.FFN in axes:
                return param
            name = jax.tree_util.keystr(path)
            if isinstance(value, qwix.QArray):
                # Scales are small: XLA brings them to their values.
                values = self._gathered(name, axes, value.qvalue)
                return param.replace(dataclasses.replace(value, qvalue=values))
            if not isinstance(value, LowRank):
                return param.replace(self._gathered(name, axes, value))
            parts = zip((axes, *lowrank.axes_of(axes)), (value.weight, value.a, value.b))
            gathered = (self._gathered(name, *part) for part in parts)
            return param.replace(LowRank(*gathered, value.scale))

        is_param = lambda x: isinstance(x, nnx.Variable)
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_param)

    def _gathered(self, name: str, axes, value):
        """One array as a layer uses it."""
        used = self.rules.used_parameter(axes, value.shape, self.shape, name)
        at_rest = self.parameter(name, axes, value.shape)
        # One dim after the other: two at a time XLA gathers as a sum of mostly zeros.
        half = [
            rest if dim is Logical.MODEL else work
            for dim, rest, work in zip(axes, _each(at_rest.spec, axes), _each(used, axes))
        ]
        stops = (PartitionSpec(*half), used)
        shardings = tuple(NamedSharding(self.mesh, stop) for stop in stops)
        return _moved(shardings, at_rest, value)


@functools.lru_cache
def _with_rows_over(placement: Placement, axes: tuple[str, ...]) -> Placement:
    """One object for equal arguments: rules are compared by identity in compiled programs."""
    activations = placement.rules.activations | {Logical.BATCH: axes}
    return dataclasses.replace(
        placement, rules=dataclasses.replace(placement.rules, activations=activations)
    )


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
