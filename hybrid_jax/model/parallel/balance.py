"""The tokens of a row dealt so that causal attention is the same work on every device, and back.

Of a row in 2n chunks, a device holds two neighbours where layers want their tokens in order: 2r and
2r+1. Causal attention costs a chunk as much as there are tokens before it, so here device r holds r
and 2n-1-r. Each half of a device's tokens moves once, to one device; from every device the even
chunks go to different ones, and so do the odd ones.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding import Axis


def deal(x_BTHK: jax.Array, axis: Axis) -> jax.Array:
    """From chunks 2r and 2r+1 to chunks r and 2n-1-r, in this order along dim 1."""
    even_BCHK, odd_BCHK = jnp.split(x_BTHK, 2, axis=1)
    even_BCHK = lax.ppermute(even_BCHK, axis, _homes(axis, 0))
    odd_BCHK = lax.ppermute(odd_BCHK, axis, _homes(axis, 1))
    return _in_order(even_BCHK, odd_BCHK, axis)


def collect(x_BTHK: jax.Array, axis: Axis) -> jax.Array:
    """The inverse of deal."""
    low_BCHK, high_BCHK = jnp.split(x_BTHK, 2, axis=1)
    even_BCHK, odd_BCHK = jnp.split(_in_order(low_BCHK, high_BCHK, axis), 2, axis=1)
    even_BCHK, odd_BCHK = (
        lax.ppermute(x, axis, [(home, origin) for origin, home in _homes(axis, parity)])
        for parity, x in enumerate((even_BCHK, odd_BCHK))
    )
    return jnp.concatenate([even_BCHK, odd_BCHK], axis=1)


def _homes(axis: Axis, parity: int) -> list[tuple[int, int]]:
    """For each device, where its chunk of this parity goes."""
    size = lax.axis_size(axis)
    chunks = [2 * device + parity for device in range(size)]
    return [(device, min(chunk, 2 * size - 1 - chunk)) for device, chunk in enumerate(chunks)]


def _in_order(even_BCHK, odd_BCHK, axis: Axis):
    """The even chunk before the odd one on even devices, where it is the lower; or the reverse."""
    even_first = lax.axis_index(axis) % 2 == 0
    first_BCHK = jnp.where(even_first, even_BCHK, odd_BCHK)
    second_BCHK = jnp.where(even_first, odd_BCHK, even_BCHK)
    return jnp.concatenate([first_BCHK, second_BCHK], axis=1)
