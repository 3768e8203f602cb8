"""Scores to expert choices and weights, in float32; balance statistics are part of the result."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.config import layers


class Choice(NamedTuple):
    """Where each token goes and how much each visit counts."""

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


def choose_softmax(logits_TE, spec: layers.SoftmaxTopK) -> Choice:
    """Softmax over all experts, top-k, renormalised (MiniMax-01 report, eq. 1).

    Equal to the softmax over the chosen logits alone, which is how it is computed.
    """
    logit_TA, expert_TA = jax.lax.top_k(logits_TE, spec.experts_per_token)
    return Choice(expert_TA, jax.nn.softmax(logit_TA, axis=-1))


def choose_sigmoid(logits_TE, bias_E, spec: layers.SigmoidTopK) -> Choice:
    """Top-k of sigmoid(logits) + bias; weights are the sigmoids alone, renormalised (M2)."""
    score_TE = jax.nn.sigmoid(logits_TE)
    biased_TE = jax.lax.stop_gradient(score_TE + bias_E[None, :])
    _, expert_TA = jax.lax.top_k(biased_TE, spec.experts_per_token)
    score_TA = jnp.take_along_axis(score_TE, expert_TA, axis=-1)
    return Choice(expert_TA, score_TA / jnp.sum(score_TA, axis=-1, keepdims=True))


def statistics(logits_TE, expert_TA, real_T, load: Load | None = None) -> Routing:
    """Balance statistics over the tokens where `real_T` (float32 0 or 1) is one."""
    E = logits_TE.shape[-1]
    hits_TE = jnp.sum(jax.nn.one_hot(expert_TA, E, dtype=jnp.float32), axis=1)
    logsumexp_T = jax.nn.logsumexp(logits_TE, axis=-1)
    probability_TE = jnp.exp(logits_TE - logsumexp_T[:, None])
    return Routing(
        hits_E=real_T @ hits_TE,
        probability_E=real_T @ probability_TE,
        logsumexp_squared=jnp.sum(real_T * jnp.square(logsumexp_T)),
        tokens=jnp.sum(real_T),
        load=load,
    )
