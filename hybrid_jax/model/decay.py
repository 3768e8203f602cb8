"""The fixed decay of every lightning head: geometric in the head, linear in the absolute layer."""

import math

import numpy as np


def head_slopes(num_heads: int) -> np.ndarray:
    """Slope of each head [H], float64: 2 ** (-8 (h + 1) / H) for a power of two.

    Other head counts follow the ALiBi rule of the released code: the slopes of the next lower power
    of two c, then every second slope of 2c (`_get_slopes` of modeling_minimax_m1.py).
    """
    if num_heads & (num_heads - 1) == 0:
        return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
    lower = 2 ** math.floor(math.log2(num_heads))
    return np.concatenate([head_slopes(lower), head_slopes(2 * lower)[::2][: num_heads - lower]])


def log_decay(num_heads: int, layer_idx: int, num_layers: int) -> np.ndarray:
    """Log of the decay per token of each head [H], float32, all < 0.

    -slope_h * (1 - l / (L - 1) + 1e-5) with l the index among all layers, softmax ones included
    (forward of MiniMaxM1Model). A single layer has factor 1 + 1e-5: there the released formula
    divides by zero.
    """
    depth = layer_idx / (num_layers - 1) if num_layers > 1 else 0.0
    return (-head_slopes(num_heads) * (1.0 - depth + 1e-5)).astype(np.float32)
