"""Logits to tokens: greedy, or sampled with temperature, top-k and top-p, in that order."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; static in compiled programs."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep the k most likely tokens; None keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach p."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0; got {self.temperature!r}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all; got {self.top_k!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p!r}.")


GREEDY = Sampling()


def sample(logits_BW, sampling: Sampling, keys_B) -> jax.Array:
    """One token a row, int32 [B]; each row draws with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    kept_BW = _keep(logits_BW.astype(jnp.float32) / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BW).astype(jnp.int32)


def next_token(logits_BW, sampling: Sampling, key) -> jax.Array:
    """`sample` with a key a row made of one; a row's key does not depend on the other rows."""
    rows_B = jnp.arange(logits_BW.shape[0])
    return sample(logits_BW, sampling, jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B))


def _keep(logits_BW, sampling: Sampling):
    """Logits with everything outside top-k and top-p at -inf; the best token always stays."""
    W = logits_BW.shape[-1]
    if sampling.top_k is not None and sampling.top_k < W:
        threshold_B1 = jax.lax.top_k(logits_BW, sampling.top_k)[0][:, -1:]
        logits_BW = jnp.where(logits_BW < threshold_B1, -jnp.inf, logits_BW)
    if sampling.top_p < 1:
        sorted_BW = jnp.sort(logits_BW, axis=-1, descending=True)
        probability_BW = jax.nn.softmax(sorted_BW, axis=-1)
        before_BW = jnp.cumsum(probability_BW, axis=-1) - probability_BW
        lowest_B1 = jnp.min(
            jnp.where(before_BW < sampling.top_p, sorted_BW, jnp.inf), axis=-1, keepdims=True
        )
        logits_BW = jnp.where(logits_BW < lowest_B1, -jnp.inf, logits_BW)
    return logits_BW
