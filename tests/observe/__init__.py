"""Tests of hybrid_jax.observe."""
