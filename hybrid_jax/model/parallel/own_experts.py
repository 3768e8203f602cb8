"""The routed mixture without exchange: every device sees the tokens and adds its own experts' part.

For decoding, where tokens are few. Rows cannot travel for nothing: their buffers hold the worst
case, counts must be known before, and each of these steps waits for the slowest device. Here tokens
that lie elsewhere are gathered whole, and one sum brings every device the results of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_jax.model import quantized
from hybrid_jax.model.ffn import dispatch
from hybrid_jax.model.ffn.router import Choice
from hybrid_jax.model.parallel.admission import ExpertAxes
from pallas_kernels import grouped_swiglu_of_layer, varying


def expert_mixture(
    x_TD,
    choice: Choice,
    gate_up_LED2F,
    down_LEFD,
    layer_idx,
    num_experts: int,
    axes: ExpertAxes,
    *,
    gather: bool,
) -> jax.Array:
    """This device's part of `ffn.moe.expert_mixture`, inside `jax.shard_map`: out_TD in float32.

    Args:
      x_TD: tokens; the same on all devices of `axes.expert`, unless `gather` is set.
      choice: of these tokens, among all experts.
      gate_up_LED2F: this device's experts in all layers, and with `axes.tensor` its part of F.
      down_LEFD: as gate_up. Both may be quantised.
      layer_idx: which of the layers.
      gather: devices of `axes.expert` hold different tokens, as many each: all are gathered first,
        and each device gets the results of its own. Costs x and out of all tokens once.

    Raises:
      ValueError: the experts do not divide over the devices.
    """
    P = lax.axis_size(axes.expert)
    if num_experts % P:
        raise ValueError(
            f"expert_mixture splits {num_experts} experts over the {P} devices of axis "
            f"{axes.expert!r}, which does not come out even; choose a mesh whose expert axis "
            f"divides {num_experts}"
        )
    tokens = x_TD, *choice
    if gather:
        tokens = tuple(lax.all_gather(x, axes.expert, tiled=True) for x in tokens)
    x_TD, expert_TA, weight_TA = tokens
    J = num_experts // P
    own_TA = expert_TA - lax.axis_index(axes.expert) * J
    # J is no expert: such rows come last, are multiplied by nothing and give zeros.
    own_TA = jnp.where((own_TA >= 0) & (own_TA < J), own_TA, J)
    token_R, row_TA, sizes_E = dispatch.expert_order(own_TA, J)
    weights = gate_up_LED2F, down_LEFD
    x_TD, weight_TA, weights = varying.alike(x_TD, weight_TA, weights)
    x_RD = dispatch.to_rows(x_TD, token_R, row_TA)
    y_RD = grouped_swiglu_of_layer(
        *(x_RD, *weights, sizes_E, layer_idx), narrow=quantized.narrow(weights)
    )
    out_TD = dispatch.combine(y_RD, weight_TA, token_R, row_TA)
    if gather:
        out_TD = lax.psum_scatter(out_TD, axes.expert, tiled=True)
        return out_TD if axes.tensor is None else lax.psum(out_TD, axes.tensor)
    expert_axes = (axes.expert,) if isinstance(axes.expert, str) else axes.expert
    tensor_axes = (axes.tensor,) if isinstance(axes.tensor, str) else axes.tensor or ()
    return lax.psum(out_TD, (*expert_axes, *tensor_axes))
