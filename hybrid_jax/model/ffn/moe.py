"""A mixture of SwiGLU experts without drops: sort by expert, grouped matmuls, weighted sum."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import layers
from hybrid_jax.model import quantized
from hybrid_jax.model.context import Context
from hybrid_jax.model.ffn import dispatch, router
from hybrid_jax.model.ffn.dense import swiglu
from hybrid_jax.model.linear import project
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.params import Initialiser
from pallas_kernels import grouped_swiglu, grouped_swiglu_of_layer
from sharding import Logical


def expert_mixture(
    x_TD, choice: router.Choice, gate_up_ED2F, down_EFD, num_experts, layer_idx=None
):
    """sum_a weight_a * down_e(silu(gate_e(x)) * up_e(x)) over each token's experts, in float32.

    With `layer_idx` the weights have a dim of layers before E, of which this is one, and may be
    quantised.
    """
    token_R, row_TA, sizes_E = dispatch.expert_order(choice.expert_TA, num_experts)
    x_RD = dispatch.to_rows(x_TD, token_R, row_TA)
    if layer_idx is not None:
        weights = gate_up_ED2F, down_EFD
        y_RD = grouped_swiglu_of_layer(
            *(x_RD, *weights, sizes_E, layer_idx), narrow=quantized.narrow(weights)
        )
    else:
        F = down_EFD.shape[1]
        gate_up = gate_up_ED2F.astype(x_TD.dtype).reshape(*gate_up_ED2F.shape[:2], 2 * F)
        y_RD = grouped_swiglu(x_RD, gate_up, down_EFD.astype(x_TD.dtype), sizes_E)
    return dispatch.combine(y_RD, choice.weight_TA, token_R, row_TA)


class SharedSwiGlu(nnx.Module):
    """Owns an expert that every token visits and the coefficient that mixes it in."""

    def __init__(self, init: Initialiser, spec: layers.SharedExpert, dim: int):
        F = spec.hidden_dim
        self.gate_up = init.matrix(
            (dim, 2, F), (Logical.MODEL, Logical.PARTS, Logical.FFN), deep=True
        )
        self.down = init.matrix((F, dim), (Logical.FFN, Logical.MODEL), deep=True)
        self.coefficient = init.matrix((dim,), (Logical.MODEL,))

    def __call__(self, x_BTD, routed_BTD):
        """(1 - c) * routed + c * shared(x), c = sigmoid(coefficient . x), all in float32."""
        logit_BT = x_BTD.astype(jnp.float32) @ self.coefficient[...].astype(jnp.float32)
        mix_BT1 = jax.nn.sigmoid(logit_BT)[:, :, None]
        shared_BTD = swiglu(x_BTD, self.gate_up[...], self.down[...]).astype(jnp.float32)
        return routed_BTD * (1 - mix_BT1) + shared_BTD * mix_BT1


class MixtureOfExperts(nnx.Module):
    """Owns the router, the routed experts and the shared expert of one layer."""

    # Inference takes these whole, for all layers, and reads only the experts that are chosen.
    whole_stack = ("gate_up", "down")

    def __init__(self, init: Initialiser, spec: layers.MoeFfn, dim: int):
        E, F = spec.num_experts, spec.hidden_dim
        self.spec = spec
        self.router = init.matrix((dim, E), (Logical.MODEL, Logical.EXPERTS), jnp.float32)
        if isinstance(spec.router, layers.SigmoidTopK):
            self.correction_bias = init.zeros((E,), (Logical.EXPERTS,), jnp.float32)
        axes = (Logical.MODEL, Logical.PARTS, Logical.FFN)
        self.gate_up = init.matrix((E, dim, 2, F), (Logical.EXPERTS, *axes), deep=True)
        axes_down = (Logical.EXPERTS, Logical.FFN, Logical.MODEL)
        self.down = init.matrix((E, F, dim), axes_down, deep=True)
        if spec.shared is not None:
            self.shared = SharedSwiGlu(init, spec.shared, dim)

    def __call__(self, x_BTD, context: Context):
        B, T, D = x_BTD.shape
        logits_BTE = project(x_BTD.astype(jnp.float32), self.router[...])
        choice = self._choose(logits_BTE, context)
        real_BT = 1 if context.segment_ids_BT is None else context.segment_ids_BT != 0
        real_BT = jnp.broadcast_to(real_BT, (B, T)).astype(jnp.float32)
        load = None
        if context.placement is None:
            choice_RA = router.Choice(*(array.reshape(B * T, -1) for array in choice))
            out_BTD = expert_mixture(
                x_BTD.reshape(B * T, D), choice_RA, self.gate_up[...], self.down[...],
                self.spec.num_experts, context.layer_idx,
            ).reshape(B, T, D)  # fmt: skip
        else:
            # Padding takes no place from tokens, and does not travel.
            expert_BTA = jnp.where(real_BT[..., None] > 0, choice.expert_TA, self.spec.num_experts)
            arrays = x_BTD, choice._replace(expert_TA=expert_BTA), self.gate_up[...], self.down[...]
            if context.layer_idx is None:
                out_BTD, load = placed.expert_mixture(
                    context.placement, *arrays, self.spec.num_experts
                )
            else:
                out_BTD = placed.stacked_expert_mixture(
                    context.placement, *arrays, context.layer_idx, self.spec.num_experts
                )
        routing = router.statistics(logits_BTE, choice.expert_TA, real_BT, load)
        if self.spec.shared is not None:
            out_BTD = self.shared(x_BTD, out_BTD)
        return out_BTD.astype(x_BTD.dtype), routing

    def _choose(self, logits_BTE, context: Context) -> router.Choice:
        spec, arrays = self.spec.router, [logits_BTE]
        if isinstance(spec, layers.SigmoidTopK):
            choose: Callable = functools.partial(router.choose_sigmoid, spec=spec)
            arrays.append(self.correction_bias[...])
        else:
            choose = functools.partial(router.choose_softmax, spec=spec)
        if context.placement is None:
            return choose(*arrays)
        return placed.choose(context.placement, choose, *arrays)
