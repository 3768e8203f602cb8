"""A weight and a low-rank correction of it as one value, which products take apart."""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import Logical

A, B = ".lora_a", ".lora_b"
"""Ends of the names of the two thin matrices; before them stands the name of the weight."""


class Parts(NamedTuple):
    """A pair, for the matrix [..., rows, rank] and the matrix [..., rank, columns]."""

    a: Any
    b: Any


def is_adaptable(axes: tuple[Logical, ...]) -> bool:
    """Whether a weight may have a correction: a matrix of a layer, other than the router."""
    own = tuple(axis for axis in axes if axis is not Logical.PARTS)
    apart = {Logical.VOCAB, Logical.RANK} & set(axes)
    return Logical.MODEL in axes and len(own) > 1 and own[1] is not Logical.EXPERTS and not apart


def axes_of(axes: tuple[Logical, ...]) -> Parts:
    """What the dims of the two matrices mean; parts of a fused projection share one A."""
    lead = 1 if axes[0] is Logical.EXPERTS else 0
    rows_end = len(axes) - 1 if axes[-1] is Logical.MODEL else lead + 1
    return Parts((*axes[:rows_end], Logical.RANK), (*axes[:lead], Logical.RANK, *axes[rows_end:]))


def shapes_of(axes: tuple[Logical, ...], shape: tuple[int, ...], rank: int) -> Parts:
    """Shapes of the two, both with the dims of stacked layers that lead `shape`."""
    stacked, own = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
    size = dict(zip(axes, own, strict=True)) | {Logical.RANK: rank}
    found = axes_of(axes)
    return Parts(*(stacked + tuple(size[axis] for axis in part) for part in found))


def initial(key: jax.Array, name: str, axes: tuple[Logical, ...], shapes: Parts) -> Parts:
    """A normal, of variance one over its rows; B zero: the product begins as nothing.

    Numbers depend on the key and the name of the weight alone.
    """
    num_rows_dims = sum(axis is not Logical.EXPERTS for axis in axes_of(axes).a) - 1
    rows = int(np.prod(shapes.a[-1 - num_rows_dims : -1]))
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    a = jax.random.normal(key, shapes.a, jnp.float32) / np.sqrt(rows).astype(np.float32)
    return Parts(a, jnp.zeros(shapes.b, jnp.float32))


def merged(weight, a, b, scale: float):
    """weight + scale * A B in float32, cast once to the dtype of the weight; numpy or JAX.

    weight [*lead, *rows, *columns], a [*lead, *rows, R], b [*lead, R, *columns].
    """
    lead = (a.ndim - 1) + (b.ndim - 1) - weight.ndim
    many, R = weight.shape[:lead], a.shape[-1]
    arrays = a.astype(np.float32).reshape(*many, -1, R), b.astype(np.float32).reshape(*many, R, -1)
    if isinstance(weight, np.ndarray):
        product = np.matmul(*arrays)
    else:
        product = jnp.matmul(*arrays, precision=jax.lax.Precision.HIGHEST)
    total = weight.astype(np.float32) + np.float32(scale) * product.reshape(weight.shape)
    return total.astype(weight.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """Stands in a model where the array of a weight would; `linear.project` multiplies with it.

    The product is not added to the weight: in bfloat16 it would be lost beneath its last bit.
    """

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @property
    def dtype(self):
        """Of the weight."""
        return self.weight.dtype

    def astype(self, dtype) -> "LowRank":
        """All three arrays in one dtype."""
        weight, a, b = (array.astype(dtype) for array in (self.weight, self.a, self.b))
        return LowRank(weight, a, b, self.scale)

    def __getitem__(self, index) -> "LowRank":
        """A part of the columns; `index` begins with whole rows, as there are no stacked dims."""
        if index is Ellipsis:
            return self
        num_rows = self.a.ndim - 1
        assert all(entry == slice(None) for entry in index[:num_rows]), "rows must stay whole"
        b = self.b[(slice(None), *index[num_rows:])]
        return LowRank(self.weight[index], self.a, b, self.scale)

    def merged(self) -> jax.Array:
        """The one weight that all this is."""
        return merged(self.weight, self.a, self.b, self.scale)


def merge(params):
    """A tree of `nnx.Variable`, stacked or not, with plain arrays alone."""

    def one(param: nnx.Variable):
        value = param[...]
        return param.replace(value.merged()) if isinstance(value, LowRank) else param

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def merge_experts(params):
    """A layer's tree of `nnx.Variable` with plain arrays for experts: they multiply by groups.

    In float32, whatever they are stored in, so that nothing is lost before they are used.
    """

    def one(param: nnx.Variable):
        value = param[...]
        if isinstance(value, LowRank) and Logical.EXPERTS in param.get_metadata()["axes"]:
            wide = dataclasses.replace(value, weight=value.weight.astype(jnp.float32))
            return param.replace(wide.merged())
        return param

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
