"""What the compiled steps take, as shapes with shardings: to compile them for devices not here.

step = inference.make_prefill_step(config, placement)
step.lower(*shapes.prefill_arguments(config, 1, 8192, 1 << 20, placement)).compile()
"""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model import abstract, quantized
from hybrid_jax.model import state as states
from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical


def parameters(
    config: ModelConfig, placement: Placement | None = None, quantize: str | None = None
):
    """The parameters as `flax.nnx.split` has them; `quantize` as in `hybrid_jax.load`."""
    _, params = nnx.split(abstract(config))
    if quantize is not None:
        params = jax.eval_shape(lambda params: quantized.quantize_params(params, quantize), params)
    if placement is None:
        return params
    params = placement.divisible(params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(params, placement.stored(params)),
    )


def prefill_arguments(
    config: ModelConfig,
    batch: int,
    chunk: int,
    capacity: int,
    placement: Placement | None = None,
    *,
    ragged: bool = False,
    quantize: str | None = None,
):
    """(params, tokens_BT, lengths_B, state) of `make_prefill_step`; lengths None unless ragged."""
    tokens_BT = _integers((batch, chunk), placement)
    lengths_B = _integers((batch,), placement) if ragged else None
    state = states.abstract_state(config, batch, capacity, placement)
    return parameters(config, placement, quantize), tokens_BT, lengths_B, state


def decode_arguments(
    config: ModelConfig,
    batch: int,
    capacity: int,
    placement: Placement | None = None,
    *,
    quantize: str | None = None,
):
    """(params, token_B, state, key) of `make_decode_step`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    if placement is not None:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placement.sharding())
    state = states.abstract_state(config, batch, capacity, placement)
    params = parameters(config, placement, quantize)
    return params, _integers((batch,), placement), state, key


def _integers(shape: tuple[int, ...], placement: Placement | None) -> jax.ShapeDtypeStruct:
    """Rows of integers, split as the rows of the state are."""
    if placement is None:
        return jax.ShapeDtypeStruct(shape, jnp.int32)
    sharding = placement.for_decoding(shape[0]).sharding(Logical.BATCH)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
