"""Both matmuls of a SwiGLU block by block, for CPUs: hidden rows stay in cache.

With 8,192 rows, 8 groups, 256 to 2 x 512 to 256, float32, on 2 cores this takes two thirds of the
time of two grouped matmuls, whose hidden rows go through memory four times.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import blocks
from pallas_kernels.grouped_swiglu.activation import gated


def why_not(target, *_) -> str | None:
    """Why a call that leaves the choice open does not get this on a target, or None."""
    if target != "cpu":
        return "the blocks are sized for a CPU's cache"
    return None


def grouped_swiglu(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset, widen=None
) -> jax.Array:
    """out_RD as in api.grouped_swiglu, without a gradient; `widen` as in `stacked`."""
    num_rows = x_RD.shape[0]
    groups = blocks.find_groups(group_sizes_E, num_rows)

    def one_group(i, out_RD):
        group = groups.active_E[i]
        index = group if group_offset is None else group_offset + group
        gate_up_DX, down_FD = (
            jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), weight)
            for weight in (gate_up_EDX, down_EFD)
        )
        if widen is not None:
            gate_up_DX, down_FD = (widen(w, x_RD.dtype) for w in (gate_up_DX, down_FD))
            gate_up_DX = gate_up_DX.reshape(gate_up_DX.shape[0], -1)

        def one_block(block, out_RD):
            x_block = block.read(x_RD)
            hidden_RX = lax.dot(x_block, gate_up_DX, preferred_element_type=jnp.float32)
            hidden_RF = gated(hidden_RX.astype(x_RD.dtype))
            new_RD = lax.dot(hidden_RF, down_FD, preferred_element_type=jnp.float32)
            return block.write(out_RD, new_RD.astype(out_RD.dtype))

        return blocks.for_each_block(groups, group, num_rows, one_block, out_RD)

    out_RD = blocks.zeros(x_RD.shape, x_RD.dtype, like=x_RD)
    return lax.fori_loop(0, groups.num_active, one_group, out_RD)
