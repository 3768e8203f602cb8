"""Tests of hybrid_jax.targets."""
