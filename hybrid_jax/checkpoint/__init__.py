"""Carry weights: Hugging Face and Orbax directories to models and back, and one into the other."""

from hybrid_jax.checkpoint.api import load as load
from hybrid_jax.checkpoint.api import save as save
from hybrid_jax.checkpoint.convert import FORMATS as FORMATS
from hybrid_jax.checkpoint.convert import Summary as Summary
from hybrid_jax.checkpoint.convert import convert as convert
