"""Declare a parameter once: its shape, what its dimensions mean, and how it starts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sharding import Logical


class MatrixDims(NamedTuple):
    """Which dims of a parameter are those of a matrix [rows, columns]; the rest are many of them.

    Numbers of dims without those of stacked layers.
    """

    rows: tuple[int, ...]
    """Dims that are summed over."""
    columns: tuple[int, ...]


def matrix_dims(axes: tuple[Logical, ...]) -> MatrixDims | None:
    """Of a matrix in a layer that reads or writes the residual stream; None for all else.

    Fused projections are a matrix a part, experts a matrix each. The router, embedding and head are
    none of these: their rows or columns are choices, not features.
    """
    if Logical.MODEL not in axes or {Logical.VOCAB, Logical.RANK} & set(axes):
        return None
    apart = (Logical.PARTS, Logical.EXPERTS)
    dims = tuple(dim for dim, logical in enumerate(axes) if logical not in apart)
    if len(dims) < 2:
        return None
    num_rows = 1 if axes[dims[0]] is Logical.MODEL else len(dims) - 1
    return MatrixDims(dims[:num_rows], dims[num_rows:])


class Initialiser:
    """Makes the parameters of a module, all with the same leading dims of stacked layers.

    A run of C equal layers in a pattern that repeats N times is one module whose every parameter
    starts with dims [N, C]; the embedding and the head have none.
    """

    def __init__(
        self,
        key: jax.Array,
        dtype,
        std: float,
        stacked: tuple[int, ...] = (),
        deep_gain: float | None = None,
    ):
        """Matrices are normal with `std`; with a `deep_gain`, those of layers as for `DeepNorm`."""
        self._key = key
        self._count = 0
        self._dtype = jnp.dtype(dtype)
        self._std = std
        self._stacked = stacked
        self._deep_gain = deep_gain

    def stack(self, *sizes: int) -> "Initialiser":
        """An initialiser for modules stacked `sizes` times, with random numbers of its own."""
        return Initialiser(self._next_key(), self._dtype, self._std, sizes, self._deep_gain)

    def matrix(
        self, shape, axes: tuple[Logical, ...], dtype=None, deep: bool | tuple[bool, ...] = False
    ) -> nnx.Param:
        """A normal matrix with the model's standard deviation.

        `deep` says that DeepNorm's gain applies to it, or for each part of a fused one whether.
        """
        std = self._std_of(tuple(shape), axes, deep)
        shape = self._stacked + tuple(shape)
        # float32 first: a bfloat16 draw has only 256 steps to each power of two.
        value = std * jax.random.normal(self._next_key(), shape, jnp.float32)
        return nnx.Param(value.astype(dtype or self._dtype), axes=tuple(axes))

    def _std_of(self, shape, axes: tuple[Logical, ...], deep: bool | tuple[bool, ...]):
        dims = matrix_dims(axes)
        if self._deep_gain is None or dims is None:
            return self._std
        fans = (math.prod(shape[dim] for dim in side) for side in dims)
        xavier = math.sqrt(2 / sum(fans))
        if isinstance(deep, bool):
            return xavier * (self._deep_gain if deep else 1.0)
        gains = jnp.array([self._deep_gain if part else 1.0 for part in deep], jnp.float32)
        after = len(shape) - axes.index(Logical.PARTS) - 1
        before = len(self._stacked) + axes.index(Logical.PARTS)
        return xavier * gains.reshape((1,) * before + gains.shape + (1,) * after)

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
    """Parameters of a model, real or abstract; scales of quantised ones are none."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return sum(math.prod(param.shape) for _, param in state)


def size_in_bytes(model: nnx.Module) -> int:
    """Memory of the parameters of a model, real or abstract, all devices together."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
