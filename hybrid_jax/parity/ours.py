"""This package's side of a comparison: the loaded model asked what an oracle is asked."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import checkpoint, inference
from hybrid_jax.checkpoint import leaves
from hybrid_jax.checkpoint.names import minimax
from hybrid_jax.model import Model

FLOAT32 = "highest"  # on accelerators the default multiplies in less


class Ours:
    """A directory loaded in float32; every array is numpy, tokens are int [B, T]."""

    def __init__(self, directory: pathlib.Path):
        self.model: Model = checkpoint.load(directory, dtype="float32")

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def logits(self, tokens_BT: np.ndarray, segment_ids: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, T, vocab] float32."""
        ids_BT = None if segment_ids is None else _ids(segment_ids)
        with jax.default_matmul_precision(FLOAT32):
            return np.asarray(_logits(*nnx.split(self.model), _ids(tokens_BT), ids_BT))

    def trace(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits of the model as it is used, and x_BTD after every layer of the same unrolled."""
        with jax.default_matmul_precision(FLOAT32):
            layers = _layers(*nnx.split(self.model), _ids(tokens_BT))
        return self.logits(tokens_BT), [np.asarray(layer) for layer in layers]

    def gradients(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        """d mean next-token cross-entropy / d weight, by released name."""
        graphdef, params = nnx.split(self.model)
        with jax.default_matmul_precision(FLOAT32):
            grads = _gradients(graphdef, params, _ids(tokens_BT))
        return by_released_name(nnx.merge(graphdef, grads))

    def greedy(self, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """The most likely continuation [B, max_new_tokens]."""
        with jax.default_matmul_precision(FLOAT32):
            out = inference.generate(self.model, tokens_BT, max_new_tokens=max_new_tokens)
        return np.asarray(out)


def next_token_loss(logits_BTW: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token given those before it, as the oracles take it."""
    log_probs_BTW = jax.nn.log_softmax(logits_BTW[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probs_BTW, tokens_BT[:, 1:, None], axis=-1))


def by_released_name(model: Model) -> dict[str, np.ndarray]:
    """The arrays of a model, or of its gradient, as the tensors of a released checkpoint."""
    arrays = {path: np.asarray(array) for path, array in leaves.arrays(model).items()}
    return {
        rule.name: rule.from_block(arrays[rule.leaf][rule.slices()])
        for rule in minimax.rules(model.config)
    }


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens_BT, segment_ids):
    return nnx.merge(graphdef, params)(tokens_BT, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _layers(graphdef, params, tokens_BT):
    return nnx.merge(graphdef, params).trace(tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, tokens_BT):
    def loss(params):
        return next_token_loss(nnx.merge(graphdef, params)(tokens_BT), tokens_BT)

    return jax.grad(loss)(params)


def _ids(tokens_BT: np.ndarray) -> jax.Array:
    return jnp.asarray(tokens_BT, jnp.int32)
