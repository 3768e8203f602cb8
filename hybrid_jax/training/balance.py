"""What keeps a mixture of experts balanced: two published losses and the router's z-loss.

Every function takes the `Routing` of a whole model: sums over real tokens, stacked over layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.config import training as config_lib
from hybrid_jax.model.ffn.router import Routing


def report_balance_loss(routing: Routing) -> jax.Array:
    """(1/E) * sum_i f_i * m_i, summed over layers (MiniMax-01 report, section 2.1; no coefficient).

    f_i is the share of all choices (tokens x experts per token) that fell on expert i, m_i the mean
    probability of expert i over tokens; 1/E**2 a layer when the load is even.
    """
    E = routing.probability_E.shape[-1]
    hits_LE = jax.lax.stop_gradient(routing.hits_E.astype(jnp.float32))
    share_LE = hits_LE / jnp.maximum(jnp.sum(hits_LE, axis=-1, keepdims=True), 1.0)
    mean_LE = routing.probability_E / _tokens(routing)
    return jnp.sum(share_LE * mean_LE) / E


def hugging_face_balance_loss(routing: Routing) -> jax.Array:
    """E * sum_e f_e * P_e over the tokens of all layers together (transformers; no coefficient).

    f_e is the mean number of times a token chose expert e (they sum to experts per token), P_e the
    mean probability; the loss is experts per token when the load is even.
    """
    L, E = routing.probability_E.shape
    hits_E = jnp.sum(jax.lax.stop_gradient(routing.hits_E.astype(jnp.float32)), axis=0)
    probability_E = jnp.sum(routing.probability_E, axis=0)
    tokens = _tokens(routing) * L
    return E * jnp.sum((hits_E / tokens) * (probability_E / tokens))


def router_z_loss(routing: Routing) -> jax.Array:
    """Mean over tokens of the squared log-normaliser of each router, summed over layers."""
    return jnp.sum(routing.logsumexp_squared) / _tokens(routing)


def load_entropy(hits_LE: jax.Array) -> jax.Array:
    """Entropy of the layer whose experts share the load least evenly, over that of an even load.

    1 if all experts of all layers get as many choices, 0 if some layer's all fall on one expert.
    """
    E = hits_LE.shape[-1]
    share_LE = hits_LE / jnp.maximum(jnp.sum(hits_LE, axis=-1, keepdims=True), 1.0)
    terms_LE = share_LE * jnp.log(jnp.where(share_LE > 0, share_LE, 1.0))
    return jnp.min(-jnp.sum(terms_LE, axis=-1)) / np.log(max(E, 2))


def _tokens(routing: Routing):
    """Real tokens; every layer saw the same ones."""
    return jnp.maximum(routing.tokens[0], 1.0)


_BALANCE = {
    config_lib.ReportBalance: report_balance_loss,
    config_lib.HuggingFaceBalance: hugging_face_balance_loss,
}


def balance_loss(config: config_lib.Balance | None, routing: Routing | None) -> jax.Array:
    """The configured balance loss times its coefficient; 0 without one or without a router."""
    if config is None or routing is None:
        return jnp.float32(0)
    return config.coefficient * _BALANCE[type(config)](routing)
