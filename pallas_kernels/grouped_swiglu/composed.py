"""Two grouped matmuls around the gate, each in the implementation for the target compiled for."""

import functools

import jax

from pallas_kernels.grouped_matmul.api import gradients, grouped_matmul
from pallas_kernels.grouped_swiglu.activation import gate_gradient, gated


def grouped_swiglu(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset) -> jax.Array:
    """out_RD as in api.grouped_swiglu, differentiated by JAX."""
    matmul = functools.partial(grouped_matmul, group_offset=group_offset)
    hidden_RX = matmul(x_RD, gate_up_EDX, group_sizes_E)
    return matmul(gated(hidden_RX), down_EFD, group_sizes_E)


def forward(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out_RD, hidden, act_RF); hidden is [R, 2F] in memory, and said to be [2, R, F].

    A choice by target needs the shapes of the TPU's kernels, and this reshape costs nothing.
    """
    R, F = x_RD.shape[0], down_EFD.shape[1]
    hidden_RX = grouped_matmul(x_RD, gate_up_EDX, group_sizes_E, group_offset=group_offset)
    act_RF = gated(hidden_RX)
    out_RD = grouped_matmul(act_RF, down_EFD, group_sizes_E, group_offset=group_offset)
    return out_RD, hidden_RX.reshape(2, R, F), act_RF


def backward(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset, hidden, act_RF, dout_RD
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, gate_up and down."""
    sizes, hidden_RX = group_sizes_E, hidden.reshape(x_RD.shape[0], -1)
    back = functools.partial(gradients, group_offset=group_offset)
    dact_RF, ddown_EFD = back(act_RF, down_EFD, sizes, dout_RD)
    dx_RD, dgate_up_EDX = back(x_RD, gate_up_EDX, sizes, gate_gradient(hidden_RX, dact_RF))
    return dx_RD, dgate_up_EDX, ddown_EFD
