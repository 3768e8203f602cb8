"""Lightning attention: SiLU on queries, keys and values, a decayed sum as memory, a gated norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.config import layers
from hybrid_jax.model import decay, remat
from hybrid_jax.model.context import Context
from hybrid_jax.model.linear import operand, project
from hybrid_jax.model.norm import rms_norm
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.params import Initialiser
from pallas_kernels import lightning_attention, lightning_decode
from sharding import Logical

_ROWS = (Logical.BATCH, Logical.TIME, Logical.HEADS, None)


def _queries_keys_values(x_BTD, qkv_DHCK):
    """silu(x W) for each third of the fused matrix, head-major as it is published."""
    if x_BTD.shape[1] == 1:
        # One token: reading the matrix is the cost, and a third of it is a strided copy.
        qkv_BTHCK = jax.nn.silu(project(x_BTD, qkv_DHCK))
        return tuple(qkv_BTHCK[..., part, :] for part in range(3))
    # Many tokens: q, k and v interleaved by head would be three strided copies, and their gradient
    # three more (the mixer's step then takes 1.5 times as long).
    return tuple(jax.nn.silu(project(x_BTD, qkv_DHCK[:, :, part])) for part in range(3))


class LightningMixer(nnx.Module):
    """Owns the parameters of one lightning layer; its state is [B, H, K, V] float32."""

    whole_state = False
    STATE_AXES = (Logical.BATCH, Logical.HEADS, None, None)

    def __init__(
        self, init: Initialiser, spec: layers.LightningAttention, dim: int, norm_eps: float
    ):
        H, K = spec.num_heads, spec.head_dim
        self.spec = spec
        axes = (Logical.MODEL, Logical.HEADS, Logical.PARTS, Logical.HEAD_DIM)
        self.qkv = init.matrix((dim, H, 3, K), axes, deep=(False, False, True))
        self.gate = init.matrix((dim, H, K), (Logical.MODEL, Logical.HEADS, Logical.HEAD_DIM))
        self.norm = init.ones((H, K), (Logical.HEADS, Logical.HEAD_DIM))
        axes_out = (Logical.HEADS, Logical.HEAD_DIM, Logical.MODEL)
        self.out = init.matrix((H, K, dim), axes_out, deep=True)

    def __call__(self, x_BTD, context: Context, log_decay_H, state_BHKV):
        dtype = x_BTD.dtype
        q_BTHK, k_BTHK, v_BTHV = _queries_keys_values(x_BTD, operand(self.qkv[...], dtype))
        segments = context.segment_ids_BT
        arrays = q_BTHK, k_BTHK, v_BTHV, log_decay_H
        if state_BHKV is not None:
            out_BTHV, state_BHKV = self._extend(context.placement, *arrays, segments, state_BHKV)
        elif context.placement is not None:
            out_BTHV = placed.lightning_attention(context.placement, *arrays, segments)
        else:
            out_BTHV, _ = lightning_attention(*arrays, segment_ids=segments)
        out_BTHV = checkpoint_name(out_BTHV, remat.RECALLED)
        # Norm over all heads together, then the gate, then the projection: the released order.
        out_BTHV = rms_norm(out_BTHV, self.norm[...], self.spec.norm_eps, num_dims=2)
        gate_BTHV = project(x_BTD, operand(self.gate[...], dtype))
        out_BTHV = out_BTHV * jax.nn.sigmoid(gate_BTHV)
        return project(out_BTHV, operand(self.out[...], dtype), 2), state_BHKV

    def _extend(self, placement, q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, state_BHKV):
        """(out_BTHV, state after these tokens): each device steps the rows and heads it holds."""

        def extend(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, state_BHKV):
            if q_BTHK.shape[1] > 1 or segment_ids_BT is not None:
                return lightning_attention(
                    *(q_BTHK, k_BTHK, v_BTHV, log_decay_H),
                    initial_state=state_BHKV,
                    segment_ids=segment_ids_BT,
                )
            out_BHV, state_BHKV = lightning_decode(
                q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], log_decay_H, state_BHKV
            )
            return out_BHV[:, None], state_BHKV

        ids = None if segment_ids_BT is None else (Logical.BATCH, None)
        in_axes = (_ROWS, _ROWS, _ROWS, (Logical.HEADS,), ids, self.STATE_AXES)
        extend = placed.on_parts(placement, extend, in_axes, (_ROWS, self.STATE_AXES))
        return extend(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, state_BHKV)

    @staticmethod
    def layer_data(spec: layers.LightningAttention, layer_idx: int, num_layers: int):
        """What differs from layer to layer: the log of the decay of each head [H]."""
        return decay.log_decay(spec.num_heads, layer_idx, num_layers)

    @staticmethod
    def initial_state(spec: layers.LightningAttention, batch: int, capacity: int, dtype):
        """Zero memory [B, H, K, V], float32 whatever the model computes in."""
        del capacity, dtype
        return jnp.zeros((batch, spec.num_heads, spec.head_dim, spec.head_dim), jnp.float32)
