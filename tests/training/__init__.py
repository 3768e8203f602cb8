"""Tests of hybrid_jax.training."""
