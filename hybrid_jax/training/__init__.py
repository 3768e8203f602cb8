"""Training: losses, optimiser, update, checkpoints and the loop."""

from hybrid_jax.training.loop import Diverged, Outcome, train
from hybrid_jax.training.restore import restore_model

__all__ = ["Diverged", "Outcome", "restore_model", "train"]
