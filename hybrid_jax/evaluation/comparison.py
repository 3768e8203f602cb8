"""How far a model's predictions are from another's of the same shape: what quantising it costs."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax.config.evaluation import Perplexity
from hybrid_jax.config.model import ModelConfig
from hybrid_jax.data import TokenStore
from hybrid_jax.evaluation import perplexity
from hybrid_jax.evaluation.model_predictor import ModelPredictor, by_columns, logits_of
from hybrid_jax.evaluation.predictor import Tick, silent
from hybrid_jax.model import Model, abstract
from hybrid_jax.model.parallel.placement import Placement


class Compared(NamedTuple):
    """What two models make of the targets of one row."""

    reference_T: np.ndarray
    """float32 natural logarithm of each target's probability, says the reference."""
    other_T: np.ndarray
    """The same of the other model."""
    divergence_T: np.ndarray
    """float32 nats: the Kullback-Leibler divergence of the other's distribution over the whole
    vocabulary from the reference's."""
    agree_T: np.ndarray
    """Whether both find the same token most likely."""


class Comparison(ModelPredictor):
    """Scores rows by two models of one configuration side by side; `score` gives `Compared`."""

    _row = Compared

    def __init__(self, reference: Model, other: Model, **options):
        """`options` as of `ModelPredictor`; both models live where its placement stores them."""
        super().__init__(reference, **options)
        self._other = other

    def _stepping(self, batch: int, capacity: int):
        step = make_comparison_step(self.model.config, self._placement)
        pair = self.model, self._other
        states = tuple(model.initial_state(batch, capacity, self._placement) for model in pair)
        return step, tuple(nnx.split(model)[1] for model in pair), states


@functools.cache
def make_comparison_step(config: ModelConfig, placement: Placement | None = None):
    """A compiled (params, tokens_BC, targets_BC, states) -> (columns of `Compared`, states).

    As `make_score_step`, with a pair of parameters and a pair of states.
    """
    graphdef, _ = nnx.split(abstract(config))

    def step(params, tokens_BC, targets_BC, states):
        pair = [nnx.merge(graphdef, each) for each in params]
        hidden = [
            model.hidden(tokens_BC, state=state, placement=placement)
            for model, state in zip(pair, states, strict=True)
        ]

        def one(x_BXD, other_BXD, targets_BX):
            logs = [
                jax.nn.log_softmax(logits_of(model, x, placement))
                for model, x in zip(pair, (x_BXD, other_BXD), strict=True)
            ]
            picked = (jnp.take_along_axis(log, targets_BX[..., None], -1)[..., 0] for log in logs)
            divergence_BX = jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
            agree_BX = jnp.argmax(logs[0], axis=-1) == jnp.argmax(logs[1], axis=-1)
            return *picked, divergence_BX, agree_BX

        columns = by_columns(one, *(each.x_BTD for each in hidden), targets_BC)
        return columns, tuple(each.state for each in hidden)

    return jax.jit(step, donate_argnames="states")


def evaluate(
    comparison: Comparison, store: TokenStore, settings: Perplexity, tick: Tick = silent
) -> dict:
    """Both perplexities, their ratio, divergence and agreement at the longest of the lengths.

    Returns {"length", "tokens", "perplexity", "reference_perplexity", "ratio", "divergence",
    "divergence_99" (of a hundred tokens one is further), "agreement"}; divergences in nats a token.
    Raises what `perplexity.evaluate` does.
    """
    store = perplexity.chosen(store, settings)
    length = max(settings.lengths)
    rows: list[Any] = []
    for tokens, targets in perplexity.slabs(store, length):
        rows.extend(comparison.score(tokens, targets, tick))
    columns = Compared(*(np.concatenate(column) for column in zip(*rows, strict=True)))
    reference, other = (-float(np.mean(column, dtype=np.float64)) for column in columns[:2])
    return {
        "length": length,
        "tokens": len(columns.divergence_T),
        "perplexity": math.exp(other),
        "reference_perplexity": math.exp(reference),
        "ratio": math.exp(other - reference),
        "divergence": float(np.mean(columns.divergence_T, dtype=np.float64)),
        "divergence_99": float(np.quantile(columns.divergence_T, 0.99)),
        "agreement": float(np.mean(columns.agree_T)),
    }


def lines(report: dict) -> list[str]:
    """The figures for a reader."""
    return [
        f"perplexity {report['perplexity']:.4f}, {report['ratio'] - 1:+.3%} against "
        f"{report['reference_perplexity']:.4f} without quantising ({report['tokens']:,} tokens, "
        f"context up to {report['length']:,})",
        f"divergence {report['divergence']:.2e} nats a token, 99 % below "
        f"{report['divergence_99']:.2e}; the same token most likely {report['agreement']:.2%}",
    ]
