"""Scores to expert choices and weights, in float32; balance statistics are part of the result."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.config import layers


class Choice(NamedTuple):
    """Where each token goes and how much each visit counts; T are one or more dims of tokens."""

    expert_TA: jax.Array
    """int32 index of each chosen expert."""
    weight_TA: jax.Array
    """float32, sums to one over A."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """What experts on many devices took and left, all devices together."""

    dropped_E: jax.Array
    """float32: how many of the real tokens' choices found no place, by expert."""
    rows_max: jax.Array
    """float32 scalar: rows that came to the busiest device, for which all others wait."""
    rows_mean: jax.Array
    """float32 scalar: rows that came to a device on average."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Sums over real tokens, from which every balance loss is made; stacked over layers outside."""

    hits_E: jax.Array
    """float32: how many of the tokens' choices fell on each expert."""
    probability_E: jax.Array
    """float32: sum of the softmax over experts of the router's logits."""
    logsumexp_squared: jax.Array
    """float32 scalar: sum of the squared log-sum-exp of the logits (router z-loss)."""
    tokens: jax.Array
    """float32 scalar: real tokens that were routed."""
    load: Load | None = None
    """With a placement: choices count as hits whether or not they found a place."""


# X are the dims of tokens, one or more. Of rows that are split, batch and time must stay apart: XLA
# gathers a whole row before it makes one dim of the two.


def choose_softmax(logits_XE, spec: layers.SoftmaxTopK) -> Choice:
    """Softmax over all experts, top-k, renormalised (MiniMax-01 report, eq. 1).

    Equal to the softmax over the chosen logits alone, which is how it is computed.
    """
    logit_XA, expert_XA = jax.lax.top_k(logits_XE, spec.experts_per_token)
    return Choice(expert_XA, jax.nn.softmax(logit_XA, axis=-1))


def choose_sigmoid(logits_XE, bias_E, spec: layers.SigmoidTopK) -> Choice:
    """Top-k of sigmoid(logits) + bias; weights are the sigmoids alone, renormalised (M2)."""
    score_XE = jax.nn.sigmoid(logits_XE)
    biased_XE = jax.lax.stop_gradient(score_XE + jnp.broadcast_to(bias_E, score_XE.shape))
    _, expert_XA = jax.lax.top_k(biased_XE, spec.experts_per_token)
    score_XA = jnp.take_along_axis(score_XE, expert_XA, axis=-1)
    return Choice(expert_XA, score_XA / jnp.sum(score_XA, axis=-1, keepdims=True))


def statistics(logits_XE, expert_XA, real_X, load: Load | None = None) -> Routing:
    """Balance statistics over the tokens where `real_X` (float32 0 or 1) is one."""
    E = logits_XE.shape[-1]
    hits_XE = jnp.sum(jax.nn.one_hot(expert_XA, E, dtype=jnp.float32), axis=-2)
    logsumexp_X = jax.nn.logsumexp(logits_XE, axis=-1)
    probability_XE = jnp.exp(logits_XE - logsumexp_X[..., None])
    return Routing(
        hits_E=jnp.tensordot(real_X, hits_XE, axes=real_X.ndim),
        probability_E=jnp.tensordot(real_X, probability_XE, axes=real_X.ndim),
        logsumexp_squared=jnp.sum(real_X * jnp.square(logsumexp_X)),
        tokens=jnp.sum(real_X),
        load=load,
    )
