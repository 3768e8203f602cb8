"""The grouped matmuls in Mosaic GPU that JAX ships for Hopper, behind our padding and limits.

tokamax has others, also for Blackwell. It asks the devices of this machine which of them can run,
so a program compiled for another machine would get its XLA fallback without a word.
"""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import varying
from pallas_kernels.grouped_matmul.ragged_dot import mask

# Rows, columns and depth of a tile: the accumulator is half of a warpgroup's registers, and four
# steps of operands with the output take 160 of 227 KiB of shared memory.
ROWS, COLUMNS, DEPTH, STEPS = 128, 128, 64, 4
_TILES = {"block_m": ROWS, "block_n": COLUMNS, "block_k": DEPTH, "max_concurrent_steps": STEPS}
# Multiprocessors of an H100 SXM and an H200; a Hopper with fewer takes the grid in two waves.
MULTIPROCESSORS = 132
# With fewer rows a group on average the tiles are mostly empty, and what counts is which matrices
# are read at all.
LEAST_ROWS = 16


def why_not(target, x_RD, w_EDF, group_sizes_E, group_offset) -> str | None:
    """Why these kernels cannot serve this call on this target; None if they can."""
    R, (_, D, F), E = x_RD.shape[0], w_EDF.shape, group_sizes_E.shape[0]
    if target != "hopper":
        return "JAX's Mosaic GPU grouped matmul is written for Hopper (compute capability 9)"
    if x_RD.dtype != jnp.bfloat16:
        return f"JAX's Mosaic GPU grouped matmul needs bfloat16, got {x_RD.dtype.name}"
    if D % ROWS or F % COLUMNS:
        return f"JAX's Mosaic GPU grouped matmul needs widths of a multiple of 128, got {D}, {F}"
    if R < LEAST_ROWS * E or R < ROWS:
        return f"{R} rows for {E} groups leave tiles of {ROWS} rows empty"
    if not _importable():
        return "JAX's Mosaic GPU grouped matmul cannot be imported: it needs absl-py"
    return None


def forward(x_RD, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """out_RF as in api.grouped_matmul."""
    return _rows_times_matrix(x_RD, w_EDF, group_sizes_E, group_offset, transpose=False)


def input_gradient(dout_RF, w_EDF, group_sizes_E, group_offset) -> jax.Array:
    """dx_RD: each row of dout times the transposed matrix of its group."""
    return _rows_times_matrix(dout_RF, w_EDF, group_sizes_E, group_offset, transpose=True)


def weight_gradient(x_RD, dout_RF, group_sizes_E) -> jax.Array:
    """dw_EDF: for each group, the transposed rows of x times the rows of dout."""

    @_one_by_one
    def multiply(x_RD, dout_RF, group_sizes_E):
        return _kernels().transposed(
            *(x_RD, dout_RF),
            group_sizes=group_sizes_E,
            **_TILES,
            grid_block_n=_columns_together(dout_RF.shape[1]),
        )

    # The kernel multiplies rows of other groups by 0, so those of none may hold no NaN.
    rows = mask(x_RD, group_sizes_E), mask(dout_RF, group_sizes_E)
    return multiply(*rows, group_sizes_E)


def _rows_times_matrix(rows_RX, w_EDF, group_sizes_E, group_offset, transpose: bool) -> jax.Array:
    if group_offset is not None:
        w_EDF = jax.lax.dynamic_slice_in_dim(w_EDF, group_offset, group_sizes_E.shape[0])

    @_one_by_one
    def multiply(rows_RX, w_EDF, group_sizes_E):
        return _kernels().forward(
            *(rows_RX, w_EDF),
            group_sizes=group_sizes_E,
            **_TILES,
            grid_block_n=_columns_together(w_EDF.shape[1 if transpose else 2]),
            transpose_rhs=transpose,
        )

    out_RY = multiply(rows_RX, w_EDF, group_sizes_E)
    # Rows of no group are not written.
    return mask(out_RY, group_sizes_E)


def _one_by_one(kernel):
    """The kernel inside shard_map, and under vmap, which its reading of the sizes does not bear."""
    return jax.custom_batching.sequential_vmap(varying.of_a_kernel(kernel))


def _columns_together(width: int) -> int:
    """Tiles of columns that are walked through before the next rows: what they share is cached."""
    return next(count for count in (8, 4, 2, 1) if width // COLUMNS % count == 0)


class _Kernels(NamedTuple):
    """As JAX has them."""

    forward: Callable[..., jax.Array]
    transposed: Callable[..., jax.Array]


@functools.cache
def _kernels() -> _Kernels:
    """Imported at the first call that can use them: they bring JAX's test utilities along."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    transposed = transposed_ragged_dot_mgpu.transposed_ragged_dot
    return _Kernels(ragged_dot_mgpu.ragged_dot, _not_asking_devices(transposed))


def _importable() -> bool:
    try:
        return bool(_kernels())
    except ImportError:
        return False


def _not_asking_devices(function):
    """The function with a `jax` in which the first device is a Hopper.

    It takes the size of its grid from a live device, which a program compiled for another machine
    does not have.
    """

    class Jax(types.ModuleType):
        def __getattr__(self, name):
            return getattr(jax, name)

        @staticmethod
        def devices():
            return [types.SimpleNamespace(core_count=MULTIPROCESSORS)]

    copy = types.FunctionType(
        function.__code__, {**function.__globals__, "jax": Jax("jax")}, function.__name__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
