"""Differences between the supported versions of JAX."""

import jax

# Interpreted, jax 0.10 stores wrongly through a reference that was bitcast or reshaped: it forgets
# the first of two transformations.
INTERPRETS_STORES_OF_BITCAST = jax.__version_info__ >= (0, 12)
