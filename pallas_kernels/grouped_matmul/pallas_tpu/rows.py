"""Rows times the matrices of their groups: the kernel behind every product that gives rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.pallas_tpu import sizes, visits


class Factor(NamedTuple):
    """An operand. Of one array a kernel may be given several parts, each as one."""

    array: jax.Array
    """Rows `[R, K]` or `[P, R, K]`; matrices `[E, K, P N]`, or `[E, N, P K]` if transposed."""
    part: int = 0


class Tile(NamedTuple):
    """Where an epilogue is: some rows of the block, and which of them are the group's."""

    rows: Any
    """pl.ds of the rows in the block."""
    own_R1: jax.Array | None
    """None if all are."""

    def store(self, ref, value, *lead: int) -> None:
        """Write the group's rows; the others keep what other groups have written."""
        where = (*lead, self.rows)
        if self.own_R1 is not None:
            value = jnp.where(self.own_R1, value, ref[where].astype(jnp.float32))
        ref[where] = value.astype(ref.dtype)


class Product(NamedTuple):
    """What to do; all static."""

    name: str
    sums: tuple[tuple[tuple[int, int], ...], ...]
    """A sum is of rows[r] times matrices[m] for its pairs (r, m)."""
    epilogue: Callable[[Tile, list, list, list], None]
    """Called with a tile, the float32 sums, references to more inputs, and those to outputs."""
    transposed: bool = False
    """Whether the matrices are multiplied from their columns' side."""
    clears: bool = False
    """Zero rows past the sum of the sizes; if not, they hold anything."""
    aliases: tuple[tuple[int, int], ...] = ()
    """Pairs (more input, output) that share their memory."""


def store_sum(tile: Tile, sums, inputs, outputs) -> None:
    """The epilogue that writes a sum as it is."""
    tile.store(outputs[0], sums[0])


class Plan(NamedTuple):
    """A product and the sizes of one call."""

    product: Product
    order: visits.Order
    tiles: sizes.RowTiles
    depth: int
    columns: int
    """Of one sum."""

    @property
    def grid(self):
        tiles = self.tiles
        return self.columns // tiles.columns, self.order.num, self.depth // tiles.depth


def multiply(
    product: Product,
    rows: Sequence[Factor],
    matrices: Sequence[Factor],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    group_sizes_E,
    group_offset,
    *,
    interpret: Any = False,
) -> list[jax.Array]:
    """The outputs, which the epilogue writes block by block.

    Args:
      inputs: what the epilogue reads beside the sums, `[R, N]` or `[P, R, N]`; outputs alike.
      group_sizes_E: int32, or `visits.Even`.
    """
    plan = _plan(product, rows, inputs, outputs, group_sizes_E, group_offset)
    scalars = plan.order.scalars
    axes = jax.typeof(rows[0].array).manual_axis_type
    first_input = len(scalars) + len(rows) + len(matrices)
    tile_spec = functools.partial(_tile_spec, plan)
    return pl.pallas_call(
        functools.partial(_kernel, plan, len(rows), len(matrices), len(inputs), len(outputs)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=plan.grid,
            in_specs=[
                *(_rows_spec(plan, x) for x in rows),
                *(_matrix_spec(plan, x) for x in matrices),
                *map(tile_spec, inputs),
            ],
            out_specs=[*map(tile_spec, outputs)],
            scratch_shapes=[
                pltpu.VMEM((plan.tiles.rows, plan.tiles.columns), jnp.float32) for _ in product.sums
            ],
        ),
        input_output_aliases={first_input + i: o for i, o in product.aliases},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=plan.tiles.vmem_limit,
        ),
        name=product.name,
        interpret=interpret,
    )(*scalars, *(x.array for x in (*rows, *matrices)), *inputs)


def _plan(product, rows, inputs, outputs, group_sizes_E, group_offset) -> Plan:
    num_rows, depth = rows[0].array.shape[-2:]
    columns = outputs[0].shape[-1]
    others = sum(1 if len(x.shape) == 2 else x.shape[0] for x in (*inputs, *outputs))
    num_matrices = len({m for pairs in product.sums for _, m in pairs})
    blocks = sizes.Blocks(len(rows), num_matrices, len(product.sums), others)
    tiles = sizes.row_tiles(num_rows, depth, columns, rows[0].array.dtype.itemsize, blocks)
    order = visits.of_rows(
        group_sizes_E, num_rows, tiles.rows, group_offset, past_the_sum=product.clears
    )
    return Plan(product, order, tiles, depth, columns)


def _rows_spec(plan: Plan, factor: Factor) -> pl.BlockSpec:
    block, tile = (plan.tiles.rows, plan.tiles.depth), plan.order.tile
    if factor.array.ndim == 2:
        return pl.BlockSpec(block, lambda n, v, k, *refs: (tile(v, refs), k))
    return pl.BlockSpec((None, *block), lambda n, v, k, *refs: (factor.part, tile(v, refs), k))


def _matrix_spec(plan: Plan, factor: Factor) -> pl.BlockSpec:
    tiles, matrix = plan.tiles, plan.order.matrix
    if plan.product.transposed:
        before = factor.part * (plan.depth // tiles.depth)
        return pl.BlockSpec(
            (None, tiles.columns, tiles.depth),
            lambda n, v, k, *refs: (matrix(v, refs), n, before + k),
        )
    before = factor.part * (plan.columns // tiles.columns)
    return pl.BlockSpec(
        (None, tiles.depth, tiles.columns), lambda n, v, k, *refs: (matrix(v, refs), k, before + n)
    )


def _tile_spec(plan: Plan, array) -> pl.BlockSpec:
    block, tile = (plan.tiles.rows, plan.tiles.columns), plan.order.tile
    if len(array.shape) == 2:
        return pl.BlockSpec(block, lambda n, v, k, *refs: (tile(v, refs), n))
    return pl.BlockSpec((array.shape[0], *block), lambda n, v, k, *refs: (0, tile(v, refs), n))


def _kernel(plan, num_rows, num_matrices, num_inputs, num_outputs, *refs):
    """One tile of rows, one block of columns and of depth, for one group."""
    product, order, tiles = plan.product, plan.order, plan.tiles
    left = list(refs)
    scalars, row_refs, matrix_refs, input_refs, output_refs, sum_refs = (
        [left.pop(0) for _ in range(count)]
        for count in (
            len(order.scalars), num_rows, num_matrices, num_inputs, num_outputs, len(product.sums)
        )
    )  # fmt: skip
    visit, depth = pl.program_id(1), pl.program_id(2)
    tile, group = order.tile(visit, scalars), order.group(visit, scalars)
    first_row = tile * tiles.rows
    begin = jnp.maximum(order.border(group, scalars) - first_row, 0)
    end = jnp.clip(order.border(group + 1, scalars) - first_row, 0, tiles.rows)
    is_whole = (begin == 0) & (end == tiles.rows)

    if product.clears:
        is_new = (visit == 0) | (order.tile(jnp.maximum(visit - 1, 0), scalars) != tile)
        is_past = first_row + tiles.rows > order.border(order.num_groups, scalars)

        @pl.when(is_new & is_past & (depth == 0))
        def _():
            for ref in output_refs:
                ref[...] = jnp.zeros_like(ref)

    def multiply_rows(rows, own_R1):
        _accumulate(plan, rows, row_refs, matrix_refs, sum_refs, depth)

        @pl.when(depth == plan.grid[2] - 1)
        def _():
            sums = [sum_ref[rows] for sum_ref in sum_refs]
            product.epilogue(Tile(rows, own_R1), sums, input_refs, output_refs)

    @pl.when(is_whole)
    def _():
        multiply_rows(pl.ds(0, tiles.rows), None)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        def piece(i, _):
            start = pl.multiple_of(i * tiles.piece, tiles.piece)
            row_R1 = start + jax.lax.broadcasted_iota(jnp.int32, (tiles.piece, 1), 0)
            multiply_rows(pl.ds(start, tiles.piece), (row_R1 >= begin) & (row_R1 < end))

        first, last = (jax.lax.div(x, tiles.piece) for x in (begin, end + tiles.piece - 1))
        jax.lax.fori_loop(first, last, piece, None)


def _accumulate(plan, rows, row_refs, matrix_refs, sum_refs, depth) -> None:
    """Add the products of some rows over one block of depth to their sums."""
    tiles, transposed = plan.tiles, plan.product.transposed
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = None if row_refs[0].dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def chunk(start, pairs):
        deep = pl.ds(start, tiles.chunk)
        products = (
            jax.lax.dot_general(
                row_refs[r][rows, deep],
                matrix_refs[m][:, deep] if transposed else matrix_refs[m][deep, :],
                dims, precision=precision, preferred_element_type=jnp.float32,
            )
            for r, m in pairs
        )  # fmt: skip
        return functools.reduce(jnp.add, products)

    is_only = tiles.chunk == plan.depth
    for pairs, sum_ref in zip(plan.product.sums, sum_refs, strict=True):
        if is_only:
            sum_ref[rows] = chunk(0, pairs)
            continue

        @pl.when(depth == 0)
        def _(sum_ref=sum_ref):
            sum_ref[rows] = jnp.zeros((rows.size, tiles.columns), jnp.float32)

        def add(i, _, pairs=pairs, sum_ref=sum_ref):
            sum_ref[rows] += chunk(pl.multiple_of(i * tiles.chunk, tiles.chunk), pairs)

        jax.lax.fori_loop(0, tiles.depth // tiles.chunk, add, None)
