"""Rows as a TPU's links take them: kernels that lay them out, and back.

Two numbers of 16 bits travel as one word of 32, for rows of 16 bits lie in pairs in a TPU's memory
and XLA would cut each in two to move them one by one. A row is whole tiles of words, which move as
they lie. XLA makes two to four passes through memory of what each of these does in one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
_HIGH = 0xFFFF0000
# Words of 6144 numbers a row and two buffers of each block take 6 MiB.
_BLOCK_ROWS = 128


def fit(x_RD: jax.Array) -> bool:
    """Whether rows are one tile of words, or more; a last one may be half full."""
    lines, rest = divmod(x_RD.shape[1], 2 * LANES)
    return x_RD.dtype == jnp.bfloat16 and lines >= SUBLANES and not rest


def pack(x_RD: jax.Array, *, interpret: Any = False) -> jax.Array:
    """bfloat16 [R, D] as uint32 [R, C, 128]; `fit` says of which.

    Columns half a row apart share a word, so that none is moved to another lane. Lines of 128 words
    are made up to whole tiles by any.
    """
    R, D = x_RD.shape
    shape = R, -(-D // (2 * LANES * SUBLANES)) * SUBLANES, LANES
    return _call(_pack, "pack_rows", [x_RD], shape, jnp.uint32, interpret)


def unpack(
    words_RCL: jax.Array, is_kept_R: jax.Array, D: int, *, interpret: Any = False
) -> jax.Array:
    """The rows of D numbers that `pack` packed; zero where they are not kept."""
    inputs = words_RCL, is_kept_R.astype(jnp.int32)[:, None]
    shape = words_RCL.shape[0], D
    return _call(_unpack, "unpack_rows", inputs, shape, jnp.bfloat16, interpret)


def unfilled(shape: tuple[int, ...], dtype, after: jax.Array, *, interpret: Any = False):
    """Memory to write on, that holds anything.

    Allocated once the scalar `after` is there: what depends on nothing inside a loop XLA holds
    outside of it, throughout the program, and copies it in each turn.
    """
    return pl.pallas_call(
        lambda after, out: None,
        out_shape=_like(after, shape, dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        name="unfilled",
        interpret=interpret,
    )(after.reshape(1))


def _call(kernel, name: str, inputs, shape, dtype, interpret) -> jax.Array:
    R = shape[0]
    rows = min(_BLOCK_ROWS, R)

    def block(array_shape):
        rest = array_shape[1:]
        return pl.BlockSpec((rows, *rest), lambda r: (r, *[0] * len(rest)))

    return pl.pallas_call(
        kernel,
        out_shape=_like(inputs[0], shape, dtype),
        grid=(pl.cdiv(R, rows),),
        in_specs=[block(x.shape) for x in inputs],
        out_specs=block(shape),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=name,
        interpret=interpret,
    )(*inputs)


def _like(x, shape, dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that x varies over."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _pack(x_ref, out_ref) -> None:
    half = x_ref.shape[1] // 2

    def bits(column):
        number = x_ref[:, pl.ds(column, LANES)].astype(jnp.float32)
        return lax.bitcast_convert_type(number, jnp.uint32)

    for c in range(half // LANES):
        low, high = bits(c * LANES), bits(half + c * LANES)
        out_ref[:, c, :] = (low >> 16) | high


def _unpack(words_ref, is_kept_ref, out_ref) -> None:
    half = out_ref.shape[1] // 2
    is_kept = is_kept_ref[...] != 0

    def number(bits):
        return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

    for c in range(half // LANES):
        words = jnp.where(is_kept, words_ref[:, c, :], jnp.uint32(0))
        out_ref[:, pl.ds(c * LANES, LANES)] = number(words << 16)
        out_ref[:, pl.ds(half + c * LANES, LANES)] = number(words & jnp.uint32(_HIGH))
