"""Rows times the matrices of their groups: the kernel behind every product that gives rows."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.pallas_tpu import sizes, visits


class Scales(NamedTuple):
    """What a matrix in eight bits is to be multiplied by, and what its bits are."""

    array_EPSN: jax.Array
    """float32; one for S-ths of the depth. Of the groups alone, whichever matrices are theirs."""
    dtype: Any
    """Of the values, which may be held as bytes."""


class Factor(NamedTuple):
    """An operand. Of one array a kernel may be given several parts, each as one."""

    array: jax.Array
    """Rows `[R, K]` or `[P, R, K]`; matrices `[E, K, P N]`, or `[E, N, P K]` if transposed, or
    `[E, P, K, N]` if they have scales."""
    part: int = 0
    scales: Scales | None = None
    """None for matrices of the rows' dtype. Of a kernel all matrices have some, or none has."""


class Matrix(NamedTuple):
    """A block of a matrix in VMEM."""

    ref: Any
    scale_ref: Any = None
    dtype: Any = None
    """Of the values, if they have scales."""


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
    scaled = [(x.part, x.scales.array_EPSN) for x in matrices if x.scales is not None]
    operands = [*(x.array for x in (*rows, *matrices)), *(array for _, array in scaled)]
    first_input = len(scalars) + len(operands)
    tile_spec = functools.partial(_tile_spec, plan)
    return pl.pallas_call(
        functools.partial(_kernel, plan, len(rows), matrices, len(inputs), len(outputs)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes) for x in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=plan.grid,
            in_specs=[
                *(_rows_spec(plan, x) for x in rows),
                *(_matrix_spec(plan, x) for x in matrices),
                *(_scale_spec(plan, *x) for x in scaled),
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
    )(*scalars, *operands, *inputs)


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
    if factor.scales is not None:
        assert not plan.product.transposed, "scales are those of columns"
        return pl.BlockSpec(
            (None, None, tiles.depth, tiles.columns),
            lambda n, v, k, *refs: (matrix(v, refs), factor.part, k, n),
        )
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


def _scale_spec(plan: Plan, part: int, array_EPSN) -> pl.BlockSpec:
    """Of the whole depth: there are few."""
    group, count = plan.order.group, array_EPSN.shape[2]
    return pl.BlockSpec(
        (None, None, count, plan.tiles.columns),
        lambda n, v, k, *refs: (group(v, refs), part, 0, n),
    )


def _tile_spec(plan: Plan, array) -> pl.BlockSpec:
    block, tile = (plan.tiles.rows, plan.tiles.columns), plan.order.tile
    if len(array.shape) == 2:
        return pl.BlockSpec(block, lambda n, v, k, *refs: (tile(v, refs), n))
    return pl.BlockSpec((array.shape[0], *block), lambda n, v, k, *refs: (0, tile(v, refs), n))


def _kernel(plan, num_rows, factors, num_inputs, num_outputs, *refs):
    """One tile of rows, one block of columns and of depth, for one group."""
    product, order, tiles = plan.product, plan.order, plan.tiles
    left = list(refs)
    scales = [x.scales for x in factors if x.scales is not None]
    scalars, row_refs, matrix_refs, scale_refs, input_refs, output_refs, sum_refs = (
        [left.pop(0) for _ in range(count)]
        for count in (
            len(order.scalars), num_rows, len(factors), len(scales), num_inputs, num_outputs,
            len(product.sums),
        )
    )  # fmt: skip
    dtypes = [x.dtype for x in scales]
    matrices = [*map(Matrix, matrix_refs, *((scale_refs, dtypes) if scales else ()))]
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
        _accumulate(plan, rows, row_refs, matrices, sum_refs, depth)

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


def _accumulate(plan, rows, row_refs, matrices, sum_refs, depth) -> None:
    """Add the products of some rows over one block of depth to their sums."""
    tiles = plan.tiles

    def chunk(start, pairs):
        products = (
            _product(plan, row_refs[r], matrices[m], rows, depth * tiles.depth, start)
            for r, m in pairs
        )
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


def _product(plan, row_ref, matrix: Matrix, rows, block, start):
    """Of some rows and the chunk of a matrix from `start` on, in the block that begins at `block`.

    Values in eight bits are exact in the rows' dtype, so their products are multiplied by scales:
    fewer numbers than the values where rows are few.
    """
    transposed = plan.product.transposed
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = None if row_ref.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST

    def product(first, size):
        deep = pl.ds(first, size)
        values = matrix.ref[:, deep] if transposed else matrix.ref[deep, :]
        if matrix.dtype is not None:
            held = values if values.dtype == matrix.dtype else pltpu.bitcast(values, matrix.dtype)
            values = held.astype(row_ref.dtype)
        return jax.lax.dot_general(
            row_ref[rows, deep], values, dims,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    if matrix.scale_ref is None:
        return product(start, plan.tiles.chunk)
    num_scales = matrix.scale_ref.shape[0]
    if num_scales == 1:
        return product(start, plan.tiles.chunk) * matrix.scale_ref[...]
    shared = plan.depth // num_scales
    size = math.gcd(shared, plan.tiles.chunk)
    parts = []
    for first in range(0, plan.tiles.chunk, size):
        place = jax.lax.div(block + start + first, shared)
        parts.append(product(start + first, size) * matrix.scale_ref[pl.ds(place, 1), :])
    return functools.reduce(jnp.add, parts)
