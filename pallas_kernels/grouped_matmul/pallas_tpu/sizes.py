"""Sizes of the blocks that a kernel holds in VMEM, by TPU generation."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

_MIB = 2**20
# Rows, columns and depths come in multiples of what a matrix unit, or a row of lanes, holds.
_UNIT = 128


class Generation(NamedTuple):
    """What one TensorCore has, and what keeps it busy."""

    vmem_limit: int
    """Bytes a kernel may take."""
    cores: int
    """TensorCores that share a grid."""
    chunk: int
    """Depth of one product of rows and matrices in straight code: more costs code and spills."""
    band: int
    """Of the depth of a result of rows times rows, the same."""
    unit: int
    """Rows of a matrix unit."""


# Schedules of libtpu 0.0.42 of the experts of Text-01 and M2, bfloat16: docs/benchmarks/kernels.md.
# Matrix units of 256 want more straight code: between pieces of it they wait.
BY_DEVICE_KIND = {
    "TPU v4": Generation(vmem_limit=16 * _MIB, cores=2, chunk=512, band=256, unit=128),
    "TPU v5": Generation(vmem_limit=60 * _MIB, cores=2, chunk=512, band=256, unit=128),
    "TPU v5 lite": Generation(vmem_limit=110 * _MIB, cores=1, chunk=512, band=256, unit=128),
    "TPU v6 lite": Generation(vmem_limit=110 * _MIB, cores=1, chunk=6144, band=1024, unit=256),
    "TPU7x": Generation(vmem_limit=60 * _MIB, cores=1, chunk=6144, band=1024, unit=256),
}
# What every generation can run.
_ANY = BY_DEVICE_KIND["TPU v4"]
# Left to the compiler, for registers it spills: up to 4.6 MiB, of 768 x 768 sums in float32.
_SPILLS = 5 * _MIB

# Most columns, over all sums of a kernel: rows are fetched once a block of columns, so 1,024 make
# 1,024 FLOPs a byte, where v6e needs 561 to be busy.
_COLUMNS, _LEAST_COLUMNS = 1536, 256
# Rows of a tile: few, for those at the border of two groups are multiplied twice; but many where
# the matrix does not stay and is fetched once a tile.
_ROWS, _ROWS_IF_SPLIT = 256, 512
_DEPTH_IF_SPLIT = 2048
# Rows are the depth of the products here: matrix units of 256 want many.
_ROWS_OF_MATRICES = 512


class RowTiles(NamedTuple):
    """Of rows times matrices."""

    rows: int
    columns: int
    """Of one sum."""
    depth: int
    chunk: int
    vmem_limit: int
    piece: int = _UNIT
    """Rows multiplied at once in a tile that several groups share."""


class MatrixTiles(NamedTuple):
    """Of rows times rows, which make matrices."""

    rows: int
    depth: int
    columns: int
    band: int
    """Of the depth; one product in straight code."""
    vmem_limit: int
    piece: int
    """Rows multiplied at once in a tile that several groups share."""


class Blocks(NamedTuple):
    """What a kernel of rows times matrices holds at a time."""

    row_factors: int
    matrix_factors: int
    sums: int
    others: int
    """Values that the epilogue reads and writes for every value of a sum."""


def generation() -> Generation:
    """Of the mesh in use, or one that every generation can run."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return BY_DEVICE_KIND.get(device.device_kind, _ANY) if device is not None else _ANY


def row_tiles(num_rows: int, depth: int, columns: int, itemsize: int, blocks: Blocks) -> RowTiles:
    """The most columns with which whole matrices stay; else both sides are cut in depth too."""
    chip = generation()
    # float32 products are six of bfloat16.
    chunk = chip.chunk // blocks.row_factors // (1 if itemsize == 2 else 4)
    chunk = _largest(depth, chunk)

    def fits(tiles: RowTiles) -> bool:
        factors = blocks.row_factors * tiles.rows + blocks.matrix_factors * tiles.columns
        values = tiles.rows * tiles.columns
        moved = itemsize * (factors * tiles.depth + values * blocks.others)
        return 2 * moved + 4 * values * blocks.sums <= chip.vmem_limit - _SPILLS

    widths = list(_shared(columns, _COLUMNS // blocks.sums, chip.cores))
    rows = _whole(num_rows, _ROWS)
    for width in widths:
        tiles = RowTiles(rows, width, depth, chunk, chip.vmem_limit)
        if fits(tiles) and (width * blocks.sums >= _LEAST_COLUMNS or width == widths[0]):
            return tiles
    rows = _whole(num_rows, _ROWS_IF_SPLIT)
    split = (
        RowTiles(rows, width, part, _largest(part, chunk), chip.vmem_limit)
        for part in _divisors(depth, _DEPTH_IF_SPLIT)
        for width in widths
        if width >= part // 4 or width == widths[0]
    )
    return max(filter(fits, split), key=lambda tiles: (tiles.columns, tiles.depth))


def matrix_tiles(num_rows: int, depth: int, columns: int, itemsize: int) -> MatrixTiles:
    """The block of the result for which the fewest bytes of rows are fetched."""
    chip = generation()
    rows, band = _whole(num_rows, _ROWS_OF_MATRICES), chip.band if itemsize == 2 else _UNIT

    piece = chip.unit if rows % chip.unit == 0 else _UNIT

    def fits(tiles: MatrixTiles) -> bool:
        values = tiles.depth * tiles.columns
        moved = itemsize * (tiles.rows * (tiles.depth + tiles.columns) + values)
        return 2 * moved + 4 * values <= chip.vmem_limit - _SPILLS

    def rank(tiles: MatrixTiles):
        blocks = (depth // tiles.depth) * (columns // tiles.columns)
        is_shared = blocks % chip.cores == 0
        # Of four units of 128, bands of other sizes, 384 say, leave some idle.
        is_even = chip.unit > 128 or tiles.band % 256 == 0
        return is_shared, is_even, 1 / (1 / tiles.depth + 1 / tiles.columns)

    every = (
        MatrixTiles(rows, part, width, _largest(part, band), chip.vmem_limit, piece)
        for part in _divisors(depth, 2048)
        for width in _divisors(columns, 2304)
    )
    return max(filter(fits, every), key=rank)


def _whole(num_rows: int, most: int) -> int:
    """Rows of a tile, no more than there are."""
    return min(most, max(num_rows // _UNIT, 1) * _UNIT)


def _divisors(size: int, most: int) -> Iterator[int]:
    """The multiples of _UNIT that divide the size, from the largest down.

    The size itself if it is no such multiple: only interpreters are given those.
    """
    if size % _UNIT:
        return iter((size,))
    return (n for n in range(min(size, most), 0, -_UNIT) if size % n == 0)


def _largest(size: int, most: int) -> int:
    return next(_divisors(size, max(most, _UNIT)))


def _shared(size: int, most: int, cores: int) -> Iterator[int]:
    """Divisors of which there are as many for each core, if there are any such."""
    found = list(_divisors(size, most))
    even = [n for n in found if size // n % cores == 0]
    return iter(even or found)
