"""Weights in eight bits with scales, as arrays of qwix: which ones, in what blocks, and back.

A `qwix.QArray` stands in a model where the array of a weight would. Its scales are float32 and have
as many dims as its values; along each dim as many values share a scale as the sizes say.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.model.params import matrix_dims
from pallas_kernels.grouped_swiglu.stacked import Narrow
from sharding import Logical

DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""What values are stored in, by scheme. int8 has a scale for each output of a matrix, as MiniMax
serves Text-01 and M1; fp8 one for each block, as M2 is released."""
HELD = DTYPES | {"fp8": jnp.dtype(jnp.uint8)}
"""What arrays of values are of: FP8 is held as its bytes, and `QArray.qtype` says so. Where there
is no arithmetic in FP8, XLA makes float16 of all arrays of it that pass through a loop, even if
parts are cut out of them and no more."""
BLOCK = (128, 128)
"""Inputs and outputs of a matrix that share a scale of fp8, at most."""

Tile = tuple[int, ...]
"""How many values along each dim of a weight share a scale."""


def check_scheme(scheme: str) -> None:
    """ValueError unless there is such a scheme."""
    if scheme not in DTYPES:
        raise ValueError(
            f"Weights can be quantised as one of {', '.join(DTYPES)}; got {scheme!r}. Leave it out "
            "to keep them as they are."
        )


def tile(
    scheme: str, axes: tuple[Logical, ...], shape: tuple[int, ...], block: tuple[int, int] = BLOCK
) -> Tile | None:
    """Of a parameter with these dims (without stacked layers); None if it is never quantised.

    Matrices of layers are; routers, norms, biases, the shared expert's coefficient, the embedding
    and the head are not. Blocks of `block` inputs and outputs hold those of the last dim of each
    side, and as many as divide it: so they never cross a head, and the last one is not short.
    """
    dims = matrix_dims(axes)
    if dims is None:
        return None
    found = [1] * len(shape)
    if scheme == "int8":
        for dim in dims.rows:
            found[dim] = shape[dim]
    else:
        for side, most in zip(dims, block, strict=True):
            found[side[-1]] = math.gcd(shape[side[-1]], most)
    return tuple(found)


def scale_shape(shape: tuple[int, ...], own: Tile) -> tuple[int, ...]:
    """Of the scales of an array that ends in the dims of `own`; each of the others has its own."""
    lead = len(shape) - len(own)
    return shape[:lead] + tuple(size // t for size, t in zip(shape[lead:], own, strict=True))


def quantize(array, scheme: str, own: Tile) -> qwix.QArray:
    """The array rounded to the nearest of eight bits, with the largest of a tile at their end."""
    lead = array.ndim - len(own)
    dims = {lead + dim: size for dim, size in enumerate(own)}
    found = qwix.quantize(
        array.astype(jnp.float32),
        DTYPES[scheme],
        channelwise_axes=(*range(lead), *(dim for dim, size in dims.items() if size == 1)),
        tiled_axes={dim: size for dim, size in dims.items() if size > 1},
    )
    if HELD[scheme] == DTYPES[scheme]:
        return found
    values = jax.lax.bitcast_convert_type(found.qvalue, HELD[scheme])
    return dataclasses.replace(found, qvalue=values)


_quantize_compiled = jax.jit(quantize, static_argnums=(1, 2))


def quantize_on_host(array: np.ndarray, scheme: str, own: Tile) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales) of `quantize` in host memory, made matrix by matrix."""
    values = np.empty(array.shape, HELD[scheme])
    scales = np.empty(scale_shape(array.shape, own), np.float32)
    lead = array.ndim - len(own)
    # Experts are matrices of their own.
    lead += next((dim for dim, size in enumerate(own) if size > 1), 0)
    for at in np.ndindex(*array.shape[:lead]):
        rest = own[len(own) - (array.ndim - lead) :]
        one = _quantize_compiled(array[at], scheme, rest)
        values[at], scales[at] = one.qvalue, one.scale
    return values, scales


def quantize_params(params, scheme: str, block: tuple[int, int] = BLOCK):
    """A tree of `nnx.Variable`, stacked or not, with quantised weights; traceable."""
    check_scheme(scheme)

    def one(param: nnx.Variable):
        axes = param.get_metadata()["axes"]
        own = tile(scheme, axes, param.shape[len(param.shape) - len(axes) :], block)
        return param if own is None else param.replace(quantize(param[...], scheme, own))

    return jax.tree.map(one, params, is_leaf=_is_variable)


def wide(weight, dtype):
    """A weight as an array in the dtype it is multiplied in: scales times values, rounded once."""
    if isinstance(weight, qwix.QArray):
        if weight.qvalue.dtype != weight.qtype:
            values = jax.lax.bitcast_convert_type(weight.qvalue, weight.qtype)
            weight = dataclasses.replace(weight, qvalue=values)
        weight = qwix.dequantize(weight)
    return weight.astype(dtype)


def one_of(weight, idx):
    """Of a stacked weight, that at a place of the first dim; the place may be traced."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, idx, keepdims=False), weight)


def narrow(weights) -> Narrow | None:
    """How an op that knows plain arrays alone reads quantised weights; None for plain arrays."""
    if not is_quantized(weights):
        return None
    return Narrow(wide, lambda weight: (weight.qvalue, weight.scale, weight.qtype))


def is_quantized(weight) -> bool:
    """Whether a weight, or any in a tree of weights, has scales."""
    leaves = jax.tree.leaves(weight, is_leaf=_is_qarray)
    return any(isinstance(leaf, qwix.QArray) for leaf in leaves)


def widen_experts(params, dtype):
    """A layer's tree of `nnx.Variable` with plain arrays for experts, to multiply by groups."""

    def one(param: nnx.Variable):
        if Logical.EXPERTS in param.get_metadata()["axes"] and is_quantized(param[...]):
            return param.replace(wide(param[...], dtype))
        return param

    return jax.tree.map(one, params, is_leaf=_is_variable)


def split(weight, spec: PartitionSpec):
    """How values and scales are split where `spec` splits the weight: `spec` if it has no scales.

    Scales that a whole dim shares are everywhere.
    """
    if not isinstance(weight, qwix.QArray):
        return spec
    entries = (*spec, *(None,) * (len(weight.shape) - len(spec)))
    own = (entry if size > 1 else None for entry, size in zip(entries, weight.scale.shape))
    return dataclasses.replace(weight, qvalue=spec, scale=PartitionSpec(*own))


def divisible(weight, sharding: NamedSharding):
    """The same weight with scales that divide as its values do: repeated where a part would end
    inside a tile.

    So 1,536 columns in tiles of 128 go to 8 devices, 192 each.
    """
    if not isinstance(weight, qwix.QArray):
        return weight
    scale = weight.scale
    for dim, entry in enumerate(sharding.spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        count = math.prod(sharding.mesh.shape[name] for name in names)
        size = weight.shape[dim] // scale.shape[dim]
        part = math.gcd(size, weight.shape[dim] // count)
        if scale.shape[dim] > 1 and part < size:
            repeat = functools.partial(jnp.repeat, repeats=size // part, axis=dim)
            is_abstract = isinstance(scale, jax.ShapeDtypeStruct)
            scale = jax.eval_shape(repeat, scale) if is_abstract else repeat(scale)
    return dataclasses.replace(weight, scale=scale)


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _is_qarray(node) -> bool:
    return isinstance(node, qwix.QArray)
