"""What training carries from one update to the next."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import model as model_lib
from hybrid_jax.config import training as config_lib
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Named, Skeleton
from sharding import processes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree; everything that an update reads and writes."""

    step: jax.Array
    """int32 scalar: updates done."""
    params: Named
    """Parameters by name."""
    optimizer: Any
    """The optimiser's own state: moments by name, and counts."""


def initial_state(
    config: config_lib.TrainConfig,
    skeleton: Skeleton,
    optimizer: Optimizer,
    placement: Placement | None = None,
):
    """The state before the first update, with parameters drawn from `config.seed`."""
    if placement is None:
        params = skeleton.named(model_lib.build(config.model, config.seed))
        return state_from(params, config, skeleton, optimizer)

    def draw():
        model = model_lib.Model(config.model, jax.random.key(config.seed))
        params = skeleton.with_adapters(skeleton.named(model), config.seed)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    # Every device draws its own part: no device ever holds the whole.
    draw_parts = jax.jit(draw, out_shardings=shardings(skeleton, optimizer, placement))
    return processes.Together(draw_parts)()


def state_from(
    params: Named,
    config: config_lib.TrainConfig,
    skeleton: Skeleton,
    optimizer: Optimizer,
    placement: Placement | None = None,
) -> TrainState:
    """The state before the first update with these parameters, which are given up.

    They are those of the model itself, where `placement` has them.
    """

    def complete(params: Named) -> TrainState:
        params = skeleton.with_adapters(params, config.seed)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    if placement is None:
        return place(complete(params))
    live = shardings(skeleton, optimizer, placement)
    return processes.Together(jax.jit(complete, out_shardings=live, donate_argnums=0))(params)


def place(state: TrainState) -> TrainState:
    """`state` bound to the first device.

    A restored state is bound too, so a resumed run compiles the very program the first one did, and
    finds it in JAX's compilation cache.
    """
    return jax.device_put(state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def shardings(skeleton: Skeleton, optimizer: Optimizer, placement: Placement) -> TrainState:
    """Where each array of the state lives: moments with their parameter, counts everywhere."""

    def one(path, leaf):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        if name not in skeleton.axes or leaf.shape != skeleton.abstract[name].shape:
            return placement.sharding()
        return placement.parameter(name, skeleton.all_axes(name), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, abstract_state(skeleton, optimizer))


def abstract_state(
    skeleton: Skeleton, optimizer: Optimizer, placement: Placement | None = None
) -> TrainState:
    """Shapes and dtypes of `initial_state`, and where they live if there is a placement.

    Allocates nothing.
    """
    state = jax.eval_shape(
        lambda params: TrainState(jnp.int32(0), params, optimizer.init(params)), skeleton.abstract
    )
    if placement is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(skeleton, optimizer, placement),
    )
