"""Root-mean-square norms, in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.model.params import Initialiser
from sharding import Logical


def rms_norm(x, scale, eps: float, num_dims: int = 1):
    """x / rms(x) * scale over the last `num_dims` dims, computed in float32, in the dtype of x.

    The scale multiplies before the cast back: one rounding, where the released code has two.
    """
    dims = tuple(range(-num_dims, 0))
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), dims, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (x32 * inverse * scale).astype(x.dtype)


class RmsNorm(nnx.Module):
    """Owns the scale of a norm over the model width."""

    def __init__(self, init: Initialiser, dim: int, eps: float):
        self.eps = eps
        self.scale = init.ones((dim,), (Logical.MODEL,))

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)
