"""The real steps with abstract arguments, placed on devices that need not be there."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.config import data as data_config
from hybrid_jax.config import layers, presets
from hybrid_jax.config import model as model_config
from hybrid_jax.config import training as train_config
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.data import Batch
from hybrid_jax.inference import shapes, steps
from hybrid_jax.model import flops
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.plan.request import Request
from hybrid_jax.rl import Cispo, PolicyBatch
from hybrid_jax.training import optimizer, parameters, placing, state, step
from sharding import Logical


@dataclasses.dataclass(frozen=True)
class Built:
    """A jitted function with what it is called with."""

    function: Any
    arguments: tuple
    tokens: int
    """That one call takes in, or makes."""
    fill: float
    """Share of the rows of experts' buffers that hold a token, if all experts get as many."""
    flops: float
    """That the mathematics of one call needs; `definitions` in the report says how counted."""


def build(request: Request, devices) -> tuple[Built, placements.Placement]:
    """Nothing is allocated. ValueError for what does not divide, or is not known."""
    parallel = Parallel(
        mesh=request.mesh,
        rules=request.rules,
        capacity_per_device=request.capacity,
        token_groups=request.token_groups,
    )
    placement = placing.make(parallel, devices)
    config = presets.get(request.preset)
    if request.remat is not None:
        config = dataclasses.replace(config, remat=request.remat)
    return _STEPS[request.step](request, config, placement), placement


def _train(
    request: Request, config: model_config.ModelConfig, placement, kind=Batch, objective=None
) -> Built:
    run = train_config.TrainConfig(
        model=config,
        data=data_config.text("-", sequence_length=request.seq),
        steps=1000,
        batch_size=request.batch,
        accumulate=request.accumulate,
        optimizer=train_config.AdamW(moments=request.moments),
    )
    placing.check(run, placement)
    skeleton = parameters.Skeleton(config)
    updates = optimizer.Optimizer(run, skeleton.axes)
    live = _placed(
        state.abstract_state(skeleton, updates), state.shardings(skeleton, updates, placement)
    )
    rows = placement.sharding(Logical.BATCH, Logical.TIME)
    numbers = "weights_BT", "advantages_BT", "old_logprobs_BT"
    shape = (request.batch, request.seq)
    fields: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name in numbers else jnp.int32, sharding=rows
        )
        for name in kind._fields
        if name != "sources_BT"
    }
    batch = kind(**fields, sources_BT=None)
    tokens = request.batch * request.seq
    return Built(
        step.make_train_step(run, skeleton, updates, placement, objective),
        (live, batch),
        tokens,
        _fill(config, placement),
        tokens * flops.training_flops(config, request.seq),
    )


def _fill(config: model_config.ModelConfig, placement: placements.Placement) -> float:
    """Share of the rows of experts' buffers that hold a token, if all experts get as many."""
    mixtures = [layer.ffn for layer in config.layers if isinstance(layer.ffn, layers.MoeFfn)]
    devices = math.prod(placement.shape.sizes[axis] for axis in placement.axes_of(Logical.EXPERTS))
    if not mixtures or devices == 1:
        return 1.0
    chosen, here = mixtures[0].router.experts_per_token, mixtures[0].num_experts // devices
    # As `admission.admit` sizes them.
    shares = devices * min(chosen, here) / chosen
    return 1 / max(1.0, min(shares, placement.experts.capacity.per_device or shares))


def _prefill(request: Request, config: model_config.ModelConfig, placement) -> Built:
    """The last chunk of a prompt: the one that sees the whole context."""
    chunk = min(request.chunk, request.seq)
    tokens = request.batch * chunk
    return Built(
        steps.make_prefill_step(config, placement),
        shapes.prefill_arguments(config, request.batch, chunk, request.seq, placement),
        tokens,
        _fill(config, placement),
        tokens * flops.forward_flops(config, request.seq - chunk / 2, head=False)
        + request.batch * 2.0 * config.hidden_dim * config.vocab_size,
    )


def _decode(request: Request, config: model_config.ModelConfig, placement) -> Built:
    """One token of every row, at the end of its context."""
    return Built(
        steps.make_decode_step(config, placement),
        shapes.decode_arguments(config, request.batch, request.seq, placement),
        request.batch,
        1.0,
        request.batch * flops.forward_flops(config, request.seq),
    )


def _placed(abstract, shardings):
    return jax.tree.map(
        lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where),
        abstract,
        shardings,
    )


_STEPS: dict[str, Callable[..., Built]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
    "rl": functools.partial(_train, kind=PolicyBatch, objective=Cispo()),
}
