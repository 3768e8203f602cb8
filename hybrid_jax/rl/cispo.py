"""Clipped importance-sampling weights: the objective of MiniMax-M1."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.rl.batch import PolicyBatch

# A ratio beyond e**20 would overflow float32 where nothing clips it.
_LARGEST_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cispo:
    """Minus the sum of sg(clip(ratio)) * advantage * log-probability over the tokens of answers.

    Every token keeps a gradient, those whose ratio is clipped too: the clipped ratio is a constant.
    An objective for `training.step.make_train_step`.

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5.
    """

    is_weight_max: float = 5.0
    """Largest importance weight itself (`1 + epsilon_high` of the report, which gives no number;
    5.0 is common)."""
    is_weight_min: float = 0.0
    """Smallest; the report has none."""

    def __post_init__(self):
        if not 0 <= self.is_weight_min <= self.is_weight_max or self.is_weight_max == 0:
            raise ValueError(
                "Cispo needs 0 <= is_weight_min <= is_weight_max, and the last above 0; got "
                f"{self.is_weight_min!r} and {self.is_weight_max!r}."
            )

    def given(self, batch: PolicyBatch) -> tuple[Any, ...]:
        """Advantages and old log-probabilities."""
        return batch.advantages_BT, batch.old_logprobs_BT

    def __call__(self, logprob_BT, weights_BT, advantages_BT, old_logprobs_BT) -> jax.Array:
        """The weight of each token's negative log-likelihood."""
        log_ratio_BT = jnp.clip(
            logprob_BT - old_logprobs_BT, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO
        )
        ratio_BT = jnp.clip(jnp.exp(log_ratio_BT), self.is_weight_min, self.is_weight_max)
        return weights_BT * ratio_BT * advantages_BT
