"""The dense SwiGLU feed-forward."""

import jax
from flax import nnx

from hybrid_jax.config import layers
from hybrid_jax.model.context import Context
from hybrid_jax.model.linear import operand, project
from hybrid_jax.model.params import Initialiser
from sharding import Logical


def swiglu(x_BTD, gate_up_D2F, down_FD):
    """down(silu(gate(x)) * up(x))."""
    gate_up_D2F = operand(gate_up_D2F, x_BTD.dtype)
    gate_BTF, up_BTF = (project(x_BTD, gate_up_D2F[:, part]) for part in range(2))
    return project(jax.nn.silu(gate_BTF) * up_BTF, operand(down_FD, x_BTD.dtype))


class DenseSwiGlu(nnx.Module):
    """Owns the two matrices of a SwiGLU."""

    def __init__(self, init: Initialiser, spec: layers.DenseFfn, dim: int):
        F = spec.hidden_dim
        self.gate_up = init.matrix(
            (dim, 2, F), (Logical.MODEL, Logical.PARTS, Logical.FFN), deep=True
        )
        self.down = init.matrix((F, dim), (Logical.FFN, Logical.MODEL), deep=True)

    def __call__(self, x_BTD, context: Context):
        return swiglu(x_BTD, self.gate_up[...], self.down[...]), None
