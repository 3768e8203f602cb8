"""silu(gate) * up of rows that hold gate and up side by side."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import target


@jax.custom_vjp
def gated(hidden_RX):
    """silu(first half) * second half: [R, F]."""
    F = hidden_RX.shape[1] // 2
    return jax.nn.silu(hidden_RX[:, :F]) * hidden_RX[:, F:]


def _forward(hidden_RX):
    return gated(hidden_RX), hidden_RX


def _backward(hidden_RX, dout_RF):
    return (gate_gradient(hidden_RX, dout_RF),)


def gate_gradient(hidden_RX, dout_RF) -> jax.Array:
    """The gradient of both halves from that of `gated`, in one pass: JAX pads each and adds."""
    branches = dict.fromkeys(target.TARGETS, _side_by_side) | {"cpu": _in_a_third_dim}
    return target.select(branches, hidden_RX, dout_RF)


def _in_a_third_dim(hidden_RX, dout_RF):
    # On a CPU a concatenation took 3.8 ms where this took 0.6 (2 cores, float32, 16 blocks of 512
    # rows of 2 x 512). A TPU has to move what it reshapes so, for its tiles are of the last two.
    R, X = hidden_RX.shape
    hidden_R2F = hidden_RX.reshape(R, 2, X // 2)
    dgate_R1F, dup_R1F = _gradients(hidden_R2F[:, :1], hidden_R2F[:, 1:], dout_RF[:, None])
    is_gate = lax.broadcasted_iota(jnp.int32, (1, 2, 1), 1) == 0
    return jnp.where(is_gate, dgate_R1F, dup_R1F).reshape(R, X)


def _side_by_side(hidden_RX, dout_RF):
    F = dout_RF.shape[1]
    halves = _gradients(hidden_RX[:, :F], hidden_RX[:, F:], dout_RF)
    return jnp.concatenate(halves, axis=1)


def _gradients(gate, up, dout):
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu


gated.defvjp(_forward, _backward)
