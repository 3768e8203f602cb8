"""The token table at the bottom of the model and the output head at its top."""

import jax.numpy as jnp
from flax import nnx

from hybrid_jax.model.params import Initialiser
from sharding import Logical


def shift_half(x_BTD, segment_ids_BT, before_BD):
    """Take the second half of the channels from the previous token of the same segment.

    `before_BD` is the embedding of the token before the first (zeros at a sequence's start); it is
    zero again after a change of segment.
    """
    D = x_BTD.shape[-1]
    previous_BTD = jnp.concatenate([before_BD[:, None, :], x_BTD[:, :-1]], axis=1)
    if segment_ids_BT is not None:
        same_BT = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
        same_BT = jnp.pad(same_BT, ((0, 0), (1, 0)), constant_values=True)
        previous_BTD = jnp.where(same_BT[:, :, None], previous_BTD, 0)
    return jnp.concatenate([x_BTD[..., : D - D // 2], previous_BTD[..., D - D // 2 :]], axis=-1)


class Embedding(nnx.Module):
    """Owns the token table."""

    def __init__(self, init: Initialiser, vocab_size: int, dim: int):
        self.table = init.matrix((vocab_size, dim), (Logical.VOCAB, Logical.MODEL))

    def __call__(self, tokens, dtype):
        return self.table[...].at[tokens].get(mode="clip").astype(dtype)


class Head(nnx.Module):
    """Owns the output matrix of a model whose embeddings are untied."""

    def __init__(self, init: Initialiser, vocab_size: int, dim: int):
        self.kernel = init.matrix((dim, vocab_size), (Logical.MODEL, Logical.VOCAB))
