"""Which tile of rows meets which group, in the order in which a kernel goes through them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """One visit is one tile of rows for one group. Tiles and groups both ascend.

    V is the most visits there may be, M the number of groups and one.
    """

    tile_V: jax.Array
    group_V: jax.Array
    border_M: jax.Array
    """Group e has the rows from border_M[e] to border_M[e + 1]."""
    offset_1: jax.Array
    """Group e has the matrix offset_1[0] + e."""
    num: jax.Array
    """Visits to make, at least 1; what `tile_V` and `group_V` say of others is meaningless."""

    @property
    def num_groups(self) -> int:
        return self.border_M.shape[0] - 1

    @property
    def scalars(self) -> tuple[jax.Array, ...]:
        """What a kernel prefetches, and gives back to the methods below as references."""
        return self.tile_V, self.group_V, self.border_M, self.offset_1

    def tile(self, visit, refs):
        """The tile of rows of a visit."""
        return refs[0][visit]

    def group(self, visit, refs):
        """The group of a visit."""
        return refs[1][visit]

    def border(self, group, refs):
        """The first row of a group; of the group after the last, the sum of all sizes."""
        return refs[2][group]

    def matrix(self, visit, refs):
        """The matrix of a visit."""
        return refs[3][0] + refs[1][visit]


class Even(NamedTuple):
    """Groups of one size that is known beforehand: a schedule can be counted without data."""

    num_groups: int
    rows: int
    """Of a group; tiles times a power of two."""
    tile_rows: int = 0

    @property
    def num(self) -> int:
        return self.num_groups * (self.rows // self.tile_rows)

    @property
    def scalars(self) -> tuple[jax.Array, ...]:
        return ()

    def tile(self, visit, refs):
        return visit

    def group(self, visit, refs):
        tiles = self.rows // self.tile_rows
        return jax.lax.shift_right_logical(visit, jnp.int32(tiles.bit_length() - 1))

    def border(self, group, refs):
        return group * self.rows

    def matrix(self, visit, refs):
        return self.group(visit, refs)


Order = Visits | Even


def of_rows(
    group_sizes_E: Any, num_rows: int, tile_rows: int, group_offset, *, past_the_sum: bool
) -> Order:
    """Every tile with rows of a group, once a group; then, on demand, the tiles without any row.

    A tile without rows is given to the last group that has some, so that its matrix stays.
    """
    if isinstance(group_sizes_E, Even):
        return group_sizes_E._replace(tile_rows=tile_rows)
    border_M, size_E = _borders(group_sizes_E, num_rows)
    first_E, count_E = _tiles(border_M, size_E, tile_rows)
    num_tiles = -(-num_rows // tile_rows)
    visit_V = jnp.arange(num_tiles + size_E.shape[0], dtype=jnp.int32)
    group_E = jnp.arange(size_E.shape[0], dtype=jnp.int32)
    last_group = jnp.max(jnp.where(size_E > 0, group_E, 0))
    group_V, tile_V, active = _listed(first_E, count_E, visit_V, last_group)
    touched = (border_M[-1] + tile_rows - 1) // tile_rows
    tile_V = jnp.where(visit_V < active, tile_V, touched + visit_V - active)
    num = active + (num_tiles - touched if past_the_sum else 0)
    return _order(tile_V, group_V, border_M, group_offset, jnp.maximum(num, 1), num_tiles)


def of_groups(group_sizes_E: Any, num_rows: int, tile_rows: int) -> Order:
    """Every group at least once, also one without rows: something is to be written for it."""
    if isinstance(group_sizes_E, Even):
        return group_sizes_E._replace(tile_rows=tile_rows)
    border_M, size_E = _borders(group_sizes_E, num_rows)
    first_E, count_E = _tiles(border_M, size_E, tile_rows)
    num_tiles = -(-num_rows // tile_rows)
    visit_V = jnp.arange(num_tiles + 2 * size_E.shape[0], dtype=jnp.int32)
    last_group = jnp.int32(size_E.shape[0] - 1)
    group_V, tile_V, num = _listed(first_E, jnp.maximum(count_E, 1), visit_V, last_group)
    return _order(tile_V, group_V, border_M, None, num, num_tiles)


def _order(tile_V, group_V, border_M, group_offset, num, num_tiles: int) -> Visits:
    offset_1 = jnp.zeros_like(border_M[:1]) if group_offset is None else group_offset[None]
    return Visits(jnp.clip(tile_V, 0, num_tiles - 1), group_V, border_M, offset_1, num)


def _borders(group_sizes_E, num_rows: int) -> tuple[jax.Array, jax.Array]:
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E), num_rows)
    border_M = jnp.concatenate([jnp.zeros_like(end_E[:1]), end_E])
    return border_M, border_M[1:] - border_M[:-1]


def _tiles(border_M, size_E, tile_rows: int) -> tuple[jax.Array, jax.Array]:
    """The first tile with rows of each group, and how many such tiles there are."""
    first_E = border_M[:-1] // tile_rows
    count_E = (border_M[1:] + tile_rows - 1) // tile_rows - first_E
    return first_E, jnp.where(size_E > 0, count_E, 0)


def _listed(first_E, count_E, visit_V, last_group) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group and tile of each visit, and how many visits the counts make."""
    until_E = jnp.cumsum(count_E)
    is_before_VE = until_E[None, :] <= visit_V[:, None]
    group_V = jnp.minimum(jnp.sum(is_before_VE.astype(jnp.int32), axis=1), last_group)
    tile_V = first_E[group_V] + visit_V - (until_E - count_E)[group_V]
    return group_V, tile_V, until_E[-1]
