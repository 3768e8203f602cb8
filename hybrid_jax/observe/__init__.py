"""What a run shows: a metrics file, a progress line and a picture of its losses."""

from hybrid_jax.observe.curve import draw_losses
from hybrid_jax.observe.lengths import draw_lengths
from hybrid_jax.observe.metrics import MetricsFile, read_metrics
from hybrid_jax.observe.progress import Progress

__all__ = ["MetricsFile", "Progress", "draw_lengths", "draw_losses", "read_metrics"]
