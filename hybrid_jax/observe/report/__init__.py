"""One HTML page about one or several runs, which opens without a network."""

from hybrid_jax.observe.report.page import render
from hybrid_jax.observe.report.recorded import Recorded

__all__ = ["Recorded", "render"]
