"""The decode state: caches of softmax layers, memories of lightning layers, lengths; a pytree."""

import dataclasses

import jax
import jax.numpy as jnp

from hybrid_jax.config.model import ModelConfig
from hybrid_jax.model.mixers.table import MIXERS


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


def initial_state(config: ModelConfig, batch: int, capacity: int) -> DecodeState:
    """An empty state for `batch` rows of at most `capacity` tokens each.

    Lightning memories are constant in size; only softmax layers use the capacity. Raises ValueError
    for sizes that are not positive.
    """
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
