"""How full the memories of lightning layers are after the beginnings of held-out documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_jax.config import layers
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.config.training import TrainConfig
from hybrid_jax.data import Batch
from hybrid_jax.model.parallel.placement import Placement
from hybrid_jax.model.state import DecodeState
from hybrid_jax.training.evaluate import Heldout
from hybrid_jax.training.parameters import Named, Skeleton
from sharding import processes

# Longer beginnings cost caches of the softmax layers, and few documents are longer.
MAX_TOKENS = 2048


class StateNorms:
    """Measures the memories on the first held-out batch; says once if it cannot."""

    def __init__(
        self,
        config: TrainConfig,
        skeleton: Skeleton,
        placement: Placement | None,
        note: Callable[[str], None],
    ):
        wanted = config.observation.state_norms and layers_of(config.model)
        measure = make_state_norms(skeleton, placement)
        self._measure = processes.Together(measure) if wanted else None
        self._note = note

    def __call__(self, params: Named, heldout: Heldout) -> dict:
        """{"state_norms": a number a lightning layer}; {} without them."""
        if self._measure is None:
            return {}
        try:
            norms = self._measure(params, heldout.feed.place(heldout.first_batch))
        except ValueError as error:
            # The same in all processes: it is about the mesh.
            self._measure = None
            self._note(f"The memories of lightning layers are not measured: {error}")
            return {}
        return {"state_norms": jax.device_get(norms).tolist()}


def make_state_norms(skeleton: Skeleton, placement: Placement | None = None):
    """A compiled (params, batch) -> float32 [lightning layers], from the first layer to the last.

    Each number is the root of the mean square of a layer's memory, over heads, keys, values, and
    those rows of the batch that hold a token. A row stands for the first of its documents, up to
    2048 tokens of it. Raises ValueError, when called, for a mesh that decoding cannot use.
    """

    def state_norms(params: Named, batch: Batch) -> jax.Array:
        tokens_BT = batch.tokens_BT[:, :MAX_TOKENS]
        B, T = tokens_BT.shape
        if batch.segment_ids_BT is None:
            real_BT = jnp.ones((B, T), jnp.int32)
        else:
            real_BT = (batch.segment_ids_BT[:, :T] == 1).astype(jnp.int32)
        model = skeleton.model(params)
        empty = model.initial_state(B, T, placement)
        after = model.hidden(tokens_BT, real_BT, state=empty, placement=placement).state
        assert after is not None
        return _by_layer(skeleton.config, after, jnp.any(real_BT > 0, axis=1))

    return jax.jit(state_norms)


def layers_of(config: ModelConfig) -> list[int]:
    """Numbers, from 0, of the layers that the norms belong to."""
    return [
        idx
        for idx, layer in enumerate(config.layers)
        if isinstance(layer.mixer, layers.LightningAttention)
    ]


def _by_layer(config: ModelConfig, state: DecodeState, is_used_B) -> jax.Array:
    """The norms in the order of the layers: the pattern again and again, run after run of it."""
    used_B = is_used_B.astype(jnp.float32)
    means_RC = []
    for run, memory in zip(config.pattern, state.entries, strict=True):
        if isinstance(run.layer.mixer, layers.LightningAttention):
            # The memory is [repeats, count, B, H, K, V].
            mean_RCB = jnp.mean(jnp.square(memory), axis=(3, 4, 5))
            means_RC.append(mean_RCB @ used_B / jnp.maximum(jnp.sum(used_B), 1.0))
    # Repeat by repeat, and within one run by run.
    return jnp.sqrt(jnp.concatenate(means_RC, axis=1).reshape(-1))
