"""Tests of hybrid_jax.cli."""
