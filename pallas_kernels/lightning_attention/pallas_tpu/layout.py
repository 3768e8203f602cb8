"""How one head's tokens are read out of a block of `[B, T, H, K]`, and written into one.

The second-minor dimension of `[B, T, H, K]` is the heads, so a head's tokens lie a row of a tile
apart. For head size 128 a strided load brings them together; strides of up to four rows are one
load, of more rows several. bfloat16 comes in words that hold two heads of one token. The words of
eight tokens and those of the next eight make sixteen tokens of each head by shifts and masks, in
the order 0, 8, 1, 9, ... 7, 15, which `token_of_row` tells: all rows of a chunk stay in it until
they are written, for that is cheaper than putting them in order.

The kernel is handed eight heads a tile, `[B, T, H/8, 8, K]`: of `[B, T, H, K]` XLA makes tiles of
sixteen heads where that suits what comes next, and strides of eight rows are slower.

Every other size is read from `[B, T, H*K]`: a copy if the array exists as `[B, T, H, K]`, none
behind a matrix product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES, _ROWS = 128, 8
_LOW, _HIGH, _HALF = 0x0000FFFF, 0xFFFF0000, 16


class Layout(NamedTuple):
    """Blocks of `heads` heads; `is_tiled` reads them from tiles of heads."""

    is_tiled: bool
    heads: int
    is_packed: bool
    """Whether a 32-bit word holds two heads: tiled bfloat16."""
    writes_words: bool = True
    """False writes head by head, which interpreters can do and the compiler cannot."""

    def shape(self, x_BTHK):
        """The shape in which the kernel takes and gives the array."""
        B, T, H, K = x_BTHK.shape
        return (B, T, H // _ROWS, _ROWS, K) if self.is_tiled else (B, T, H * K)

    def spec(self, tokens: int, size: int, token_block) -> pl.BlockSpec:
        """A block of `tokens` tokens; `token_block(t)` is which one, for step t."""
        if self.is_tiled:
            return pl.BlockSpec(
                (1, tokens, None, self.heads, size),
                lambda b, h, t, *_: (b, token_block(t), h, 0, 0),
            )
        return pl.BlockSpec(
            (1, tokens, self.heads * size), lambda b, h, t, *_: (b, token_block(t), h)
        )

    def groups(self) -> list[tuple[int, ...]]:
        """The heads that are read and written together."""
        together = 2 if self.is_packed else 1
        return [tuple(range(h, h + together)) for h in range(0, self.heads, together)]

    def token_of_row(self, row):
        """Where in its chunk the token is that lies in this row of what `read` returns."""
        if not self.is_packed:
            return row
        return (row & ~15) | ((row & 15) >> 1) | ((row & 1) << 3)

    def in_rows(self, x_XC):
        """Put the last dimension, the tokens of a chunk, in the order of rows."""
        if not self.is_packed:
            return x_XC
        return x_XC.reshape(*x_XC.shape[:-1], -1, 2, _ROWS).swapaxes(-1, -2).reshape(x_XC.shape)

    def read(self, ref, start, tokens: int, group: tuple[int, ...]) -> list[jax.Array]:
        """`[tokens, K]` of each head of the group, from token `start` of the block on."""
        if not self.is_tiled:
            size = ref.shape[-1] // self.heads
            (head,) = group
            return [ref[0, pl.ds(start, tokens), head * size : (head + 1) * size]]
        words, stride = _words(ref, start, tokens)
        words_CK = words[pl.ds(group[0] // len(group), tokens, stride=stride), :]
        if not self.is_packed:
            return [words_CK]
        words_N28K = words_CK.reshape(-1, 2, _ROWS, _LANES)
        return [
            pltpu.bitcast(x.reshape(tokens // 2, _LANES), ref.dtype)
            for x in _exchange(words_N28K[:, 0], words_N28K[:, 1])
        ]

    def write(self, ref, start, group: tuple[int, ...], values: list[jax.Array]) -> None:
        """The inverse of `read`, from float32 values."""
        values = [x.astype(ref.dtype) for x in values]
        tokens = values[0].shape[0]
        if not self.is_tiled:
            size = ref.shape[-1] // self.heads
            (head,) = group
            ref[0, pl.ds(start, tokens), head * size : (head + 1) * size] = values[0]
            return
        if self.is_packed and not self.writes_words:
            for head, x in zip(group, values, strict=True):
                x = x.reshape(-1, _ROWS, 2, _LANES).swapaxes(1, 2).reshape(tokens, _LANES)
                ref[0, pl.ds(start, tokens), head] = x
            return
        if self.is_packed:
            words = (pltpu.bitcast(x, jnp.uint32).reshape(-1, _ROWS, _LANES) for x in values)
            values = [jnp.stack(_exchange(*words), axis=1).reshape(tokens, _LANES)]
        if not self.writes_words:
            ref[0, pl.ds(start, tokens), group[0]] = values[0]
            return
        words, stride = _words(ref, start, tokens)
        words[pl.ds(group[0] // len(group), tokens, stride=stride), :] = values[0]


def _words(ref, start, tokens: int):
    """Some tokens of the block as rows of 32-bit lanes, and how many rows a token has."""
    ref = ref.at[0, pl.ds(start, tokens)]
    if ref.dtype == jnp.bfloat16:
        ref = ref.bitcast(jnp.uint32)
    tokens, rows, lanes = ref.shape
    return ref.reshape(tokens * rows, lanes), rows


def _exchange(first, second):
    """Low halves of both words together, and high halves; its own inverse."""
    low, high, half = (jnp.uint32(x) for x in (_LOW, _HIGH, _HALF))
    return (first & low) | (second << half), (first >> half) | (second & high)


def choose(heads: int, key_dim: int, value_dim: int, dtype, writes_words: bool) -> Layout:
    """Tiled where heads come in whole tiles; else flat, in the fewest heads that fill lanes."""
    if heads % _ROWS == 0 and key_dim == value_dim == _LANES:
        return Layout(True, _ROWS, dtype == jnp.bfloat16, writes_words)
    for block in range(1, heads):
        fills = (block * key_dim) % _LANES == 0 and (block * value_dim) % _LANES == 0
        if heads % block == 0 and fills and block >= min(4, heads):
            return Layout(False, block, False)
    return Layout(False, heads, False)
