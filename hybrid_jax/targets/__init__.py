"""Chips a program can be compiled for: what they can do, and their compilers, without the chips."""

from hybrid_jax.targets.chips import CHIPS, Chip, parse
from hybrid_jax.targets.compilers import CompilerMissing, found, require
from hybrid_jax.targets.program import compile_for
from hybrid_jax.targets.topology import devices

__all__ = [
    "CHIPS",
    "Chip",
    "CompilerMissing",
    "compile_for",
    "devices",
    "found",
    "parse",
    "require",
]
