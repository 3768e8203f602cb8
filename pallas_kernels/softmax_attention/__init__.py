"""Causal softmax attention over packed rows and over a partly filled cache."""
