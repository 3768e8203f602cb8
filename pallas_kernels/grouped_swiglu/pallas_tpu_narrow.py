"""The experts of one layer on TPUs, read in eight bits out of the arrays for all layers.

Nothing is cut out, laid out anew or widened in HBM: kernels read the matrices of groups with rows,
and widen a block in VMEM.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.pallas_tpu import rows
from pallas_kernels.grouped_swiglu import pallas_tpu

# Widths come in whole rows of lanes; rows of fewer than a tile are padded, they are few.
_UNIT = 128


class Weight(NamedTuple):
    """Values in eight bits, and scales for blocks of them."""

    values: jax.Array
    """[L, E, D, 2, F] or [L, E, F, D]."""
    scales: jax.Array
    """float32, with the dims of the values, each of which is a multiple of its own."""
    dtype: Any
    """Of the values, which may be held as bytes."""


def why_not(x_RD, gate_up: Weight, down: Weight) -> str | None:
    """Why these kernels cannot serve this call on a TPU; None if they can."""
    if 0 in x_RD.shape or 0 in gate_up.values.shape:
        return "there is nothing to multiply"
    for weight, depth, shared in _depths(gate_up, down):
        columns = weight.values.shape[-1]
        if depth % _UNIT or columns % _UNIT:
            return f"the TPU kernels need widths of a multiple of {_UNIT}, got {depth}, {columns}"
        if shared % _UNIT:
            return f"the TPU kernels need a scale for {_UNIT} rows of a matrix, got {shared}"
        if weight.scales.shape[:2] != weight.values.shape[:2]:
            return "the TPU kernels need scales for each matrix"
    return None


def grouped_swiglu(
    x_RD, gate_up: Weight, down: Weight, group_sizes_E, layer_idx, *, interpret: Any = False
) -> jax.Array:
    """out_RD as in `stacked.grouped_swiglu_of_layer`, which says what the weights are."""
    R, F = x_RD.shape[0], down.values.shape[2]
    x_RD = jnp.pad(x_RD, ((0, max(_UNIT - R, 0)), (0, 0)))
    groups = group_sizes_E, layer_idx * group_sizes_E.shape[0]
    # As the compiler stores [D, 2, F]: a view.
    array, scales = _of_groups(gate_up._replace(
        values=gate_up.values.swapaxes(2, 3), scales=gate_up.scales.swapaxes(2, 3)
    ), layer_idx)  # fmt: skip
    gate = rows.Product("grouped_swiglu_narrow", pallas_tpu.EACH, pallas_tpu.activate)
    act = jax.ShapeDtypeStruct((x_RD.shape[0], F), x_RD.dtype)
    parts = [rows.Factor(array, part, scales) for part in (0, 1)]
    (act_RF,) = rows.multiply(
        gate, [rows.Factor(x_RD)], parts, [], [act], *groups, interpret=interpret
    )
    array, scales = _of_groups(down._replace(
        values=down.values[:, :, None], scales=down.scales[:, :, None]
    ), layer_idx)  # fmt: skip
    product = rows.Product(
        "grouped_matmul_narrow", sums=(((0, 0),),), epilogue=rows.store_sum, clears=True
    )
    out = jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype)
    (out_RD,) = rows.multiply(
        product, [rows.Factor(act_RF)], [rows.Factor(array, 0, scales)], [], [out], *groups,
        interpret=interpret,
    )  # fmt: skip
    return out_RD[:R]


def _depths(gate_up: Weight, down: Weight):
    """Each weight, its depth, and how much of that shares a scale."""
    for weight in (gate_up, down):
        depth, count = weight.values.shape[2], weight.scales.shape[2]
        yield weight, depth, depth // count


def _of_groups(weight: Weight, layer_idx) -> tuple[jax.Array, rows.Scales]:
    """Of [L, E, P, K, N] all matrices [L E, P, K, N], and the scales of one layer, one a column."""
    scales = jax.lax.dynamic_index_in_dim(weight.scales, layer_idx, keepdims=False)
    scales = jnp.repeat(scales, weight.values.shape[-1] // scales.shape[-1], axis=-1)
    values = weight.values.reshape(-1, *weight.values.shape[2:])
    return values, rows.Scales(scales, weight.dtype)
