"""Lightning attention: SiLU on queries, keys and values, a decayed sum as memory, a gated norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import layers
from hybrid_jax.model import decay
from hybrid_jax.model.context import Context
from hybrid_jax.model.norm import rms_norm
from hybrid_jax.model.params import Initialiser
from pallas_kernels import lightning_attention, lightning_decode
from sharding import Logical


class LightningMixer(nnx.Module):
    """Owns the parameters of one lightning layer; its state is [B, H, K, V] float32."""

    def __init__(
        self, init: Initialiser, spec: layers.LightningAttention, dim: int, norm_eps: float
    ):
        H, K = spec.num_heads, spec.head_dim
        self.spec = spec
        axes = (Logical.MODEL, Logical.HEADS, Logical.PARTS, Logical.HEAD_DIM)
        self.qkv = init.matrix((dim, H, 3, K), axes)
        self.gate = init.matrix((dim, H, K), (Logical.MODEL, Logical.HEADS, Logical.HEAD_DIM))
        self.norm = init.ones((H, K), (Logical.HEADS, Logical.HEAD_DIM))
        self.out = init.matrix((H, K, dim), (Logical.HEADS, Logical.HEAD_DIM, Logical.MODEL))

    def __call__(self, x_BTD, context: Context, log_decay_H, state_BHKV):
        dtype = x_BTD.dtype
        qkv_BTHCK = jnp.einsum("btd,dhck->bthck", x_BTD, self.qkv[...].astype(dtype))
        qkv_BTHCK = jax.nn.silu(qkv_BTHCK)
        q_BTHK, k_BTHK, v_BTHV = (qkv_BTHCK[..., idx, :] for idx in range(3))
        single = x_BTD.shape[1] == 1 and state_BHKV is not None and context.segment_ids_BT is None
        if single:
            out_BHV, state_BHKV = lightning_decode(
                q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], log_decay_H, state_BHKV
            )
            out_BTHV = out_BHV[:, None]
        else:
            out_BTHV, state_BHKV = lightning_attention(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                log_decay_H,
                initial_state=state_BHKV,
                segment_ids=context.segment_ids_BT,
            )
        # Norm over all heads together, then the gate, then the projection: the released order.
        out_BTHV = rms_norm(out_BTHV, self.norm[...], self.spec.norm_eps, num_dims=2)
        gate_BTHV = jnp.einsum("btd,dhv->bthv", x_BTD, self.gate[...].astype(dtype))
        out_BTHV = out_BTHV * jax.nn.sigmoid(gate_BTHV)
        return jnp.einsum("bthv,hvd->btd", out_BTHV, self.out[...].astype(dtype)), state_BHKV

    @staticmethod
    def layer_data(spec: layers.LightningAttention, layer_idx: int, num_layers: int):
        """What differs from layer to layer: the log of the decay of each head [H]."""
        return decay.log_decay(spec.num_heads, layer_idx, num_layers)

    @staticmethod
    def initial_state(spec: layers.LightningAttention, batch: int, capacity: int, dtype):
        """Zero memory [B, H, K, V], float32 whatever the model computes in."""
        del capacity, dtype
        return jnp.zeros((batch, spec.num_heads, spec.head_dim, spec.head_dim), jnp.float32)
