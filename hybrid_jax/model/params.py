"""Declare a parameter once: its shape, what its dimensions mean, and how it starts."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sharding import Logical


class Initialiser:
    """Makes the parameters of a module, all with the same leading dims of stacked layers.

    A run of C equal layers in a pattern that repeats N times is one module whose every parameter
    starts with dims [N, C]; the embedding and the head have none.
    """

    def __init__(self, key: jax.Array, dtype, std: float, stacked: tuple[int, ...] = ()):
        self._key = key
        self._count = 0
        self._dtype = jnp.dtype(dtype)
        self._std = std
        self._stacked = stacked

    def stack(self, *sizes: int) -> "Initialiser":
        """An initialiser for modules stacked `sizes` times, with random numbers of its own."""
        return Initialiser(self._next_key(), self._dtype, self._std, sizes)

    def matrix(self, shape, axes: tuple[Logical, ...], dtype=None) -> nnx.Param:
        """A normal matrix with the model's standard deviation."""
        shape = self._stacked + tuple(shape)
        # float32 first: a bfloat16 draw has only 256 steps to each power of two.
        value = self._std * jax.random.normal(self._next_key(), shape, jnp.float32)
        return nnx.Param(value.astype(dtype or self._dtype), axes=tuple(axes))

    def ones(self, shape, axes: tuple[Logical, ...]) -> nnx.Param:
        """A scale that starts at one."""
        return nnx.Param(jnp.ones(self._stacked + tuple(shape), self._dtype), axes=tuple(axes))

    def zeros(self, shape, axes: tuple[Logical, ...], dtype=None) -> nnx.Param:
        """A bias that starts at zero."""
        return nnx.Param(
            jnp.zeros(self._stacked + tuple(shape), dtype or self._dtype), axes=tuple(axes)
        )

    def _next_key(self):
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def logical_axes(param: nnx.Param) -> tuple[Logical, ...]:
    """What every dim of a parameter means, the stacked ones included."""
    own = param.get_metadata()["axes"]
    return (Logical.LAYERS,) * (len(param.shape) - len(own)) + tuple(own)


def count(model: nnx.Module) -> int:
    """Parameters of a model, real or abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
