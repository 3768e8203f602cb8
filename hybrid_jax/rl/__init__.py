"""Reinforcement learning: objectives that weigh the tokens of sampled answers."""

from hybrid_jax.rl.batch import PolicyBatch
from hybrid_jax.rl.cispo import Cispo

__all__ = ["Cispo", "PolicyBatch"]
