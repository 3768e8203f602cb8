"""Softmax attention: grouped queries, partial rotary positions, optional norm of q and k."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybrid_jax.config import layers
from hybrid_jax.model import remat
from hybrid_jax.model.context import Context
from hybrid_jax.model.linear import operand, project
from hybrid_jax.model.norm import rms_norm
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.params import Initialiser
from hybrid_jax.model.rotary import rotate
from pallas_kernels import softmax_attention
from sharding import Logical


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Rotated keys and values, valid up to the length of each row: of one layer, or of all."""

    k_BSGK: jax.Array
    v_BSGV: jax.Array

    def write(self, k_BTGK, v_BTGV, lengths_B, layer_idx) -> "KeyValues":
        """Of the caches of all layers, put T new rows into one, at each row's length.

        In place where the caches are given up. The caller makes sure that the rows fit.
        """
        B = lengths_B.shape[0]
        places_B3 = jnp.stack(
            [jnp.full((B,), layer_idx), jnp.arange(B, dtype=jnp.int32), lengths_B], axis=1
        )

        def put(cache_LBSGK, new_BTGK):
            # [T, ...] of a row go to [layer, row, its length:, ...].
            cache, new = _without_one_head(cache_LBSGK), _without_one_head(new_BTGK)
            dims = jax.lax.ScatterDimensionNumbers(
                update_window_dims=tuple(range(1, new.ndim)),
                inserted_window_dims=(0, 1),
                scatter_dims_to_operand_dims=(0, 1, 2),
            )
            written = jax.lax.scatter(
                *(cache, places_B3, new.astype(cache.dtype), dims),
                indices_are_sorted=True,
                unique_indices=True,
                mode=jax.lax.GatherScatterMode.CLIP,
            )
            return written.reshape(cache_LBSGK.shape)

        return KeyValues(put(self.k_BSGK, k_BTGK), put(self.v_BSGV, v_BTGV))

    def layer(self, layer_idx) -> "KeyValues":
        """Of the caches of all layers, that of one."""

        def one(cache_LBSGK):
            cache = _without_one_head(cache_LBSGK)
            cache = jax.lax.dynamic_index_in_dim(cache, layer_idx, keepdims=False)
            return cache.reshape(cache_LBSGK.shape[1:])

        return jax.tree.map(one, self)


def _without_one_head(x):
    """[..., G, K] without the dim of heads if there is but one.

    On TPUs writing and reading would else want two layouts of such a dim, and each token a copy of
    all caches from one to the other.
    """
    return jnp.squeeze(x, axis=-2) if x.shape[-2] == 1 else x


_CACHE = (Logical.BATCH, None, Logical.KV_HEADS, None)


class SoftmaxMixer(nnx.Module):
    """Owns the parameters of one softmax layer; its state is `KeyValues`."""

    # Decoding takes the caches of all layers: cut out, one would be copied to and fro.
    whole_state = True
    STATE_AXES: Any = KeyValues(_CACHE, _CACHE)  # type: ignore[arg-type]

    def __init__(self, init: Initialiser, spec: layers.SoftmaxAttention, dim: int, norm_eps: float):
        H, G, K = spec.num_heads, spec.num_kv_heads, spec.head_dim
        heads, kv_heads = (Logical.HEADS, Logical.HEAD_DIM), (Logical.KV_HEADS, Logical.HEAD_DIM)
        self.spec = spec
        self.norm_eps = norm_eps
        self.q = init.matrix((dim, H, K), (Logical.MODEL, *heads))
        self.k = init.matrix((dim, G, K), (Logical.MODEL, *kv_heads))
        self.v = init.matrix((dim, G, K), (Logical.MODEL, *kv_heads), deep=True)
        self.out = init.matrix((H, K, dim), (*heads, Logical.MODEL), deep=True)
        if spec.qk_norm:
            self.q_norm = init.ones((H, K), heads)
            self.k_norm = init.ones((G, K), kv_heads)

    def __call__(self, x_BTD, context: Context, layer_data, state: KeyValues | None):
        del layer_data
        dtype = x_BTD.dtype
        q_BTHK = project(x_BTD, operand(self.q[...], dtype))
        k_BTGK = project(x_BTD, operand(self.k[...], dtype))
        v_BTGV = project(x_BTD, operand(self.v[...], dtype))
        if self.spec.qk_norm:
            # Over the whole projection, before the heads are split and rotated (M2).
            q_BTHK = rms_norm(q_BTHK, self.q_norm[...], self.norm_eps, num_dims=2)
            k_BTGK = rms_norm(k_BTGK, self.k_norm[...], self.norm_eps, num_dims=2)
        q_BTHK = rotate(q_BTHK, context.positions_BT, self.spec.rotary_dim, self.spec.rope_theta)
        k_BTGK = rotate(k_BTGK, context.positions_BT, self.spec.rotary_dim, self.spec.rope_theta)
        segments = context.segment_ids_BT
        if state is not None:
            out_BTHV, state = self._extend(context, q_BTHK, k_BTGK, v_BTGV, state)
        elif context.placement is not None:
            out_BTHV = placed.softmax_attention(context.placement, q_BTHK, k_BTGK, v_BTGV, segments)
        else:
            out_BTHV = softmax_attention(
                q_BTHK, k_BTGK, v_BTGV, q_segment_ids=segments, kv_segment_ids=segments
            )
        out_BTHV = checkpoint_name(out_BTHV, remat.ATTENDED)
        return project(out_BTHV, operand(self.out[...], dtype), 2), state

    def _extend(self, context: Context, q_BTHK, k_BTGK, v_BTGV, state: KeyValues):
        """(out_BTHV, the cache with these tokens): each device reads the rows and heads it holds.

        Right-padded rows write rows past their length that causality hides and later tokens
        overwrite, so the cache needs no segments of its own.
        """

        def extend(q_BTHK, k_BTGK, v_BTGV, state, lengths_B, layer_idx):
            state = state.write(k_BTGK, v_BTGV, lengths_B, layer_idx)
            own = state.layer(layer_idx)
            return softmax_attention(q_BTHK, own.k_BSGK, own.v_BSGV, q_offset=lengths_B), state

        q = (Logical.BATCH, Logical.TIME, Logical.HEADS, None)
        kv = (Logical.BATCH, Logical.TIME, Logical.KV_HEADS, None)
        caches = KeyValues((None, *_CACHE), (None, *_CACHE))  # type: ignore[arg-type]
        in_axes = (q, kv, kv, caches, (Logical.BATCH,), ())
        extend = placed.on_parts(context.placement, extend, in_axes, (q, caches))
        return extend(q_BTHK, k_BTGK, v_BTGV, state, context.lengths_B, context.layer_idx)

    @staticmethod
    def layer_data(spec: layers.SoftmaxAttention, layer_idx: int, num_layers: int):
        """Nothing differs from layer to layer."""
        return None

    @staticmethod
    def initial_state(spec: layers.SoftmaxAttention, batch: int, capacity: int, dtype):
        """An empty cache of `capacity` tokens a row, in the dtype of the computation."""
        shape = (batch, capacity, spec.num_kv_heads, spec.head_dim)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
