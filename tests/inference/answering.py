"""What a model answers to ragged prompts and two more tokens each; members that divide by eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import inference
from tests.model import configs

CAPACITY, CHUNK = 24, 8


def _sized(config):
    """The model with dims that divide by eight, and weights that do not amplify rounding."""

    def wide(run):
        mixer = dataclasses.replace(run.layer.mixer, num_heads=8)
        if hasattr(mixer, "num_kv_heads"):
            mixer = dataclasses.replace(mixer, num_kv_heads=8)
        ffn = dataclasses.replace(run.layer.ffn, num_experts=8, hidden_dim=16)
        return dataclasses.replace(run, layer=dataclasses.replace(run.layer, mixer=mixer, ffn=ffn))

    pattern = tuple(map(wide, config.pattern))
    return dataclasses.replace(config, pattern=pattern, hidden_dim=32, initializer_range=0.1)


MODELS = {
    "text_01": _sized(configs.text_01()),
    "m2": _sized(configs.m2()),
    # Dense and shared feed-forwards, tied and shifted embeddings; three heads, four experts.
    "odd": dataclasses.replace(configs.odd(), initializer_range=0.1),
}


# Both chunks of a prompt are one program: each has a row that ends in it.
LENGTHS = (13, 6, 9, 1, 12, 8, 3, 10)


def answers(model, rows, placement=None, steps=2):
    """Logits after ragged prompts in chunks and each of `steps` <= 2 more tokens; the state."""
    width = 2 * CHUNK
    lengths = np.array(LENGTHS)[:rows] if rows > 1 else np.array([width])
    tokens = configs.tokens(len(LENGTHS), width + 2)[:rows]
    state = model.initial_state(rows, CAPACITY, placement)
    logits, state = inference.prefill(model, tokens[:, :width], lengths, state, CHUNK, placement)
    found = [logits]
    step = jax.jit(
        lambda params, token_B, state: inference.decode_step(
            nnx.merge(nnx.split(model)[0], params), token_B, state, placement
        )
    )
    for ahead in range(steps):
        token = tokens[np.arange(rows), lengths + ahead]
        logits, state = step(nnx.split(model)[1], jnp.asarray(token), state)
        found.append(logits)
    return jax.device_get((found, _without_padding(state)))


def _without_padding(state):
    """Caches with zeros past each row's length: what padding left there nobody ever sees."""
    real_BS = jnp.arange(CAPACITY)[None] < state.lengths_B[:, None]

    def one(leaf):
        is_cache = leaf.ndim > 1 and leaf.shape[2:4] == real_BS.shape
        return jnp.where(real_BS[None, None, :, :, None, None], leaf, 0) if is_cache else leaf

    return jax.tree.map(one, state)


def assert_close(expected, found):
    """Sums in another order: relative to the largest of an array."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, one), many in pairs:
        limit = 1e-5 * np.abs(one).max()
        assert np.abs(many - one).max() <= limit, jax.tree_util.keystr(path)
