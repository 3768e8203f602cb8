"""Training: losses, optimiser, update, checkpoints and the loop."""

from hybrid_jax.training.diverged import Diverged
from hybrid_jax.training.loop import Outcome, train
from hybrid_jax.training.restore import restore_model

__all__ = ["Diverged", "Outcome", "restore_model", "train"]
