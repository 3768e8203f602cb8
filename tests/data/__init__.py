"""Tests of hybrid_jax.data."""
