"""A vocabulary in parts, inside `jax.shard_map`: tokens go to the words, for words are larger."""

from typing import NamedTuple

import jax
from jax import lax

from hybrid_jax.model.parallel import weights


class Words(NamedTuple):
    """Mesh axes that split a vocabulary; static."""

    axes: tuple[str, ...]
    """All of them, the outermost first."""
    also_tokens: tuple[str, ...]
    """Those that split rows of tokens too: all their rows must meet all words."""

    def bring(self, rows: jax.Array) -> jax.Array:
        """The rows [B, ...] of all devices that share this device's tokens' words: [G * B, ...]."""
        return lax.all_gather(rows, self.also_tokens, tiled=True) if self.also_tokens else rows

    def add_and_return(self, rows: jax.Array) -> jax.Array:
        """Parts [G * B, ...] of sums over words: summed, [B, ...], each device with its rows."""
        if self.also_tokens:
            rows = lax.psum_scatter(rows, self.also_tokens, tiled=True)
        rest = tuple(axis for axis in self.axes if axis not in self.also_tokens)
        return lax.psum(rows, rest) if rest else rows

    def own(self, rows: jax.Array) -> jax.Array:
        """Of what `bring` brought, this device's [B, ...]."""
        if not self.also_tokens:
            return rows
        count = rows.shape[0] // lax.axis_size(self.also_tokens)
        return lax.dynamic_slice_in_dim(rows, lax.axis_index(self.also_tokens) * count, count)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over all parts of the vocabulary, on each of its devices."""
        return lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        """The same for the largest."""
        return lax.pmax(x, self.axes) if self.axes else x

    def here(self, ids: jax.Array, count: int) -> jax.Array:
        """Where ids lie among this device's `count` words; not in 0 .. count - 1, elsewhere."""
        return ids - (lax.axis_index(self.axes) * count if self.axes else 0)


WHOLE = Words((), ())
"""All words on every device."""


def of(stored: weights.Stored, dim: int) -> Words:
    """How the words of a weight are split, which are its dim `dim`."""
    split = stored.split[dim]
    return Words(split, tuple(axis for axis in split if axis in stored.token_axes))
