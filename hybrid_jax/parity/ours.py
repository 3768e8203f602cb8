"""This package's side of a comparison: the loaded model asked what an oracle is asked."""

import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import checkpoint, inference
from hybrid_jax.model import Model
from hybrid_jax.parity import published

FLOAT32 = "highest"  # on accelerators the default multiplies in less


class Ours:
    """A directory loaded in float32; every array is numpy, tokens are int [B, T]."""

    def __init__(self, directory: pathlib.Path):
        self.model: Model = checkpoint.load(directory, dtype="float32")
        self._format = "hf"
        if published.read_spec(directory).dialect == "original":
            self._format = "hf-original"

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def trace(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits, and x_BTD after every layer."""
        graphdef, params = nnx.split(self.model)

        @jax.jit
        def run(params, tokens_BT):
            model = nnx.merge(graphdef, params)
            return model(tokens_BT), model.trace(tokens_BT)

        with jax.default_matmul_precision(FLOAT32):
            logits, layers = run(params, jnp.asarray(tokens_BT, jnp.int32))
        return np.asarray(logits), [np.asarray(layer) for layer in layers]

    def gradients(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        """d mean next-token cross-entropy / d weight, by published name."""
        graphdef, params = nnx.split(self.model)

        @jax.jit
        def run(params, tokens_BT):
            return jax.grad(
                lambda params: next_token_loss(nnx.merge(graphdef, params)(tokens_BT), tokens_BT)
            )(params)

        with jax.default_matmul_precision(FLOAT32):
            grads = run(params, jnp.asarray(tokens_BT, jnp.int32))
        return named(nnx.merge(graphdef, grads), self._format)

    def greedy(self, tokens_BT: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """The most likely continuation [B, max_new_tokens]."""
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        with jax.default_matmul_precision(FLOAT32):
            out = inference.generate(self.model, tokens_BT, max_new_tokens=max_new_tokens)
        return np.asarray(out)


def next_token_loss(logits_BTW: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token given those before it, as the oracles take it."""
    log_probs_BTW = jax.nn.log_softmax(logits_BTW[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probs_BTW, tokens_BT[:, 1:, None], axis=-1))


def named(model: Model, format: str) -> dict[str, np.ndarray]:
    """The arrays of a model (or of its gradient) by published name, without derived tensors."""
    tensors: typing.Iterable = checkpoint.published_tensors(model, format)
    return {
        name: np.asarray(value) for name, value in tensors if not published.DERIVED.search(name)
    }
