"""The decode state: caches of softmax layers, memories of lightning layers, lengths; a pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model.mixers.table import MIXERS
from hybrid_jax.model.parallel.placement import Placement
from sharding import Logical


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a sequence carries from one call to the next."""

    entries: tuple
    """One a run of the pattern: the state of its mixer with leading dims [repeats, count]."""
    lengths_B: jax.Array
    """int32: tokens that each row has seen."""
    last_token_B: jax.Array
    """int32: the last token of each row, -1 before the first (for shifted embeddings)."""

    def size_in_bytes(self) -> int:
        """Bytes of all arrays, real or abstract."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def initial_state(
    config: ModelConfig, batch: int, capacity: int, placement: Placement | None = None
) -> DecodeState:
    """An empty state for `batch` rows of at most `capacity` tokens each.

    Lightning memories are constant in size; only softmax layers use the capacity. With a placement
    every device makes its own part. Raises ValueError for sizes that are not positive, and what
    `shardings` raises.
    """
    if placement is None:
        return _empty(config, batch, capacity)
    live = shardings(config, batch, capacity, placement)
    return jax.jit(lambda: _empty(config, batch, capacity), out_shardings=live)()


def abstract_state(
    config: ModelConfig, batch: int, capacity: int, placement: Placement | None = None
) -> DecodeState:
    """Shapes, dtypes and, with a placement, shardings of `initial_state`; allocates nothing."""
    shapes = jax.eval_shape(lambda: _empty(config, batch, capacity))
    if placement is None:
        return shapes
    live = shardings(config, batch, capacity, placement)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, live
    )


def shardings(config: ModelConfig, batch: int, capacity: int, placement: Placement) -> DecodeState:
    """Where each array of a state lives: rows as `Placement.for_decoding` says, heads over tensor.

    A mesh axis may not be larger than the number of key-value heads it splits: copies of a cache
    would fill the memory that more devices are there to save. ValueError with the numbers.
    """
    shapes = jax.eval_shape(lambda: _empty(config, batch, capacity))
    return _placed(config, shapes, placement.for_decoding(batch))


def constrain(config: ModelConfig, state: DecodeState, placement: Placement | None) -> DecodeState:
    """Tell the compiler that a state lives where `shardings` says; as it is without a placement."""
    if placement is None:
        return state
    live = _placed(config, state, placement.for_decoding(state.lengths_B.shape[0]))
    return jax.lax.with_sharding_constraint(state, live)


def _placed(config: ModelConfig, state: DecodeState, placement: Placement) -> DecodeState:
    def one(run, axes, leaf):
        axes = (Logical.LAYERS, Logical.LAYERS, *axes)
        mixer = type(run.layer.mixer).__name__
        return placement.activation(f"the state of {mixer}", axes, leaf.shape)

    entries = tuple(
        jax.tree.map(
            lambda axes, leaf, run=run: one(run, axes, leaf),
            *(MIXERS[type(run.layer.mixer)].STATE_AXES, entry),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for run, entry in zip(config.pattern, state.entries, strict=True)
    )
    rows: Any = placement.sharding(Logical.BATCH)
    return DecodeState(entries, rows, rows)


def _empty(config: ModelConfig, batch: int, capacity: int) -> DecodeState:
    if batch <= 0 or capacity <= 0:
        raise ValueError(
            f"batch and capacity must be positive; got batch={batch}, capacity={capacity}."
        )

    def stacked(run):
        mixer = run.layer.mixer
        one = MIXERS[type(mixer)].initial_state(
            mixer, batch, capacity, jnp.dtype(config.dtypes.compute)
        )
        lead = (config.repeats, run.count)
        return jax.tree.map(lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype), one)

    return DecodeState(
        entries=tuple(stacked(run) for run in config.pattern),
        lengths_B=jnp.zeros((batch,), jnp.int32),
        last_token_B=jnp.full((batch,), -1, jnp.int32),
    )
