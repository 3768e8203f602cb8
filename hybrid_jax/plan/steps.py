"""The real steps with abstract arguments, placed on devices that need not be there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.config import model as model_config
from hybrid_jax.config import presets
from hybrid_jax.config import training as train_config
from hybrid_jax.data import Batch
from hybrid_jax.model import flops
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.plan.request import Request
from hybrid_jax.training import optimizer, parameters, state, step
from sharding import Logical


@dataclasses.dataclass(frozen=True)
class Built:
    """A jitted function with what it is called with."""

    function: Any
    arguments: tuple
    tokens: int
    """That one call takes in, or makes."""
    flops: float
    """That the mathematics of one call needs; `definitions` in the report says how counted."""


def build(request: Request, devices) -> tuple[Built, placements.Placement]:
    """Nothing is allocated. ValueError for what does not divide, or is not known."""
    placement = placements.make(request.mesh, request.rules, devices)
    config = presets.get(request.preset)
    if request.remat is not None:
        config = dataclasses.replace(config, remat=request.remat)
    return _STEPS[request.step](request, config, placement), placement


def _train(request: Request, config: model_config.ModelConfig, placement) -> Built:
    run = train_config.TrainConfig(
        model=config,
        data=train_config.Text(path="-", sequence_length=request.seq),
        steps=1000,
        batch_size=request.batch,
        accumulate=request.accumulate,
    )
    skeleton = parameters.Skeleton(config)
    updates = optimizer.Optimizer(run, skeleton.axes)
    live = _placed(
        state.abstract_state(skeleton, updates), state.shardings(skeleton, updates, placement)
    )
    rows = placement.sharding(Logical.BATCH, Logical.TIME)
    kinds: dict[str, Any] = dict.fromkeys(Batch._fields, jnp.int32) | {"weights_BT": jnp.float32}
    shape = (request.batch, request.seq)
    fields: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in kinds.items()
    }
    batch = Batch(**fields)
    tokens = request.batch * request.seq
    return Built(
        step.make_train_step(run, skeleton, updates, placement),
        (live, batch),
        tokens,
        3 * tokens * flops.forward_flops(config, request.seq / 2),
    )


def _placed(abstract, shardings):
    return jax.tree.map(
        lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
        abstract,
        shardings,
    )


_STEPS = {"train": _train}
