"""Groups of consecutive rows cut into blocks, and a loop over the blocks of a group.

Each group is cut into blocks from the largest size down, and a loop with a traced trip count runs
over each size; only the last, smallest block may reach past its group, and is masked. So no row is
copied to a padded layout, and the waste is under one smallest block a group. Carries are updated
in place: XLA copies the whole carry in the branches of a `lax.switch`, but not in loops, which is
why a choice of block size is a loop of zero or one trips.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Rows of one matmul, measured on CPU: more sizes win nothing and cost compile time.
BLOCKS = (512, 256, 64, 16)
# With few rows a group (decode), the smallest block by the greatest mean rows a group it is for.
SMALL_BLOCKS = ((2, 1), (8, 4))


class Groups(NamedTuple):
    start_E: jax.Array
    end_E: jax.Array
    active_E: jax.Array
    """Ids of the groups with rows, ascending; what follows the first num_active is meaningless."""
    num_active: jax.Array


class Block(NamedTuple):
    """`size` rows from row `first`; `own_R1` marks those of the group, None where all are."""

    first: jax.Array
    size: int
    own_R1: jax.Array | None

    def read(self, rows_RX) -> jax.Array:
        return lax.dynamic_slice(rows_RX, (self.first, 0), (self.size, rows_RX.shape[1]))

    def read_own(self, rows_RX) -> jax.Array:
        """The group's rows, zeros for others (whose values may be anything)."""
        read_RX = self.read(rows_RX)
        return read_RX if self.own_R1 is None else jnp.where(self.own_R1, read_RX, 0)

    def write(self, rows_RX, new_RX) -> jax.Array:
        if self.own_R1 is not None:
            new_RX = jnp.where(self.own_R1, new_RX, self.read(rows_RX))
        return lax.dynamic_update_slice(rows_RX, new_RX, (self.first, 0))


def find_groups(group_sizes_E, num_rows: int) -> Groups:
    """Where groups begin and end (never past the rows), and which have any."""
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E), num_rows)
    start_E = jnp.concatenate([jnp.zeros_like(end_E[:1]), end_E[:-1]])
    count_1E = jnp.cumsum((end_E > start_E).astype(jnp.int32))[None, :]
    nth_E1 = jnp.arange(end_E.shape[0], dtype=jnp.int32)[:, None]
    active_E = jnp.sum((count_1E <= nth_E1).astype(jnp.int32), axis=1)
    return Groups(start_E, end_E, active_E, count_1E[0, -1])


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Block sizes from the largest down; at most the last one computes rows in vain."""
    small = (size for mean, size in SMALL_BLOCKS if num_rows <= mean * num_groups)
    last = min(next(small, BLOCKS[-1]), num_rows)
    # A block of all rows would not depend on its loop, and XLA would compute it outside, always.
    return tuple(size for size in BLOCKS if last < size < num_rows) + (last,)


def for_each_block(
    groups: Groups, group, num_rows: int, body: Callable[[Block, Any], Any], carry
) -> Any:
    """Run `carry = body(block, carry)` over the blocks of one group."""
    first, end = groups.start_E[group], groups.end_E[group]
    sizes = block_sizes(num_rows, groups.start_E.shape[0])
    for size in sizes[:-1]:
        count = (end - first) // size
        carry = lax.fori_loop(
            0,
            count,
            lambda i, carry, size=size, first=first: body(
                Block(first + i * size, size, None), carry
            ),
            carry,
        )
        first = first + count * size
    size = sizes[-1]

    def last_block(i, carry):
        begin = first + i * size
        # Move a block that would reach past the array up; rows above `begin` are done already.
        moved = jnp.minimum(begin, num_rows - size)
        row_R1 = moved + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        return body(Block(moved, size, (row_R1 >= begin) & (row_R1 < end)), carry)

    return lax.fori_loop(0, (end - first + size - 1) // size, last_block, carry)


def zeros(shape: tuple[int, ...], dtype, like) -> jax.Array:
    """Zeros that vary over the manual mesh axes of `like`, as a loop's carry must."""
    axes = jax.typeof(like).manual_axis_type.varying
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros
