"""The experts on TPUs: the gate, and its gradient, in the kernels of the products beside it.

Only tiles with rows are read, multiplied and written, but for the zeros of the results that callers
see. Matrices are taken as they lie, also transposed.
"""

from typing import Any

import jax

from pallas_kernels.grouped_matmul import pallas_tpu as products
from pallas_kernels.grouped_matmul.api import among_all
from pallas_kernels.grouped_matmul.pallas_tpu import matrices, rows

EACH = (((0, 0),), ((0, 1),))
"""Sums of gate and up."""
_ONE = (((0, 0),),)
_ADDED = (((0, 0), (1, 1)),)


def why_not(target, x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset=None) -> str | None:
    """Why these kernels cannot serve this call on this target; None if they can."""
    return products.why_not(target, x_RD, down_EFD, group_sizes_E, group_offset)


def grouped_swiglu(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset, *, interpret: Any = False
) -> jax.Array:
    """out_RD as in api.grouped_swiglu."""
    outputs = [_like(x_RD, x_RD.shape[0], down_EFD.shape[1])]
    (act_RF,) = _gate_up(
        activate, x_RD, gate_up_EDX, outputs, group_sizes_E, group_offset, interpret
    )
    return products.forward(act_RF, down_EFD, group_sizes_E, group_offset, interpret=interpret)


def forward(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out_RD, hidden_2RF, act_RF): hidden rows, gate and up, and what was made of them."""
    R, F = x_RD.shape[0], down_EFD.shape[1]
    outputs = [_like(x_RD, R, F), _like(x_RD, 2, R, F)]
    act_RF, hidden_2RF = _gate_up(
        _activate_and_keep, x_RD, gate_up_EDX, outputs, group_sizes_E, group_offset, interpret
    )
    out_RD = products.forward(act_RF, down_EFD, group_sizes_E, group_offset, interpret=interpret)
    return out_RD, hidden_2RF, act_RF


def backward(
    x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset, hidden_2RF, act_RF, dout_RD,
    *, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of x, gate_up and down."""
    sizes = group_sizes_E, group_offset
    gate = rows.Product(
        "grouped_swiglu_gate_gradient", _ONE, _differentiate, transposed=True, aliases=((0, 0),)
    )
    (dhidden_2RF,) = rows.multiply(
        gate, [rows.Factor(dout_RD)], [rows.Factor(down_EFD)],
        [hidden_2RF], [hidden_2RF], *sizes, interpret=interpret,
    )  # fmt: skip
    dx = rows.Product("grouped_swiglu_dx", _ADDED, rows.store_sum, transposed=True, clears=True)
    hidden_parts, matrix_parts = (
        [rows.Factor(x, part) for part in (0, 1)] for x in (dhidden_2RF, gate_up_EDX)
    )
    (dx_RD,) = rows.multiply(
        dx, hidden_parts, matrix_parts, [], [x_RD], *sizes, interpret=interpret
    )
    ddown_EFD = matrices.multiply(
        act_RF, dout_RD[None], group_sizes_E, name="grouped_swiglu_ddown", interpret=interpret
    )
    dgate_up_EDX = matrices.multiply(
        x_RD, dhidden_2RF, group_sizes_E, name="grouped_swiglu_dgate_up", interpret=interpret
    )
    return (
        dx_RD,
        among_all(dgate_up_EDX, gate_up_EDX, group_offset),
        among_all(ddown_EFD, down_EFD, group_offset),
    )


def _like(x_RD, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x_RD.dtype)


def _gate_up(epilogue, x_RD, gate_up_EDX, outputs, group_sizes_E, group_offset, interpret):
    product = rows.Product("grouped_swiglu_gate_up", EACH, epilogue)
    factors = [rows.Factor(x_RD)], [rows.Factor(gate_up_EDX, part) for part in (0, 1)]
    return rows.multiply(
        product, *factors, [], outputs, group_sizes_E, group_offset, interpret=interpret
    )


def activate(tile, sums, inputs, outputs) -> None:
    """The epilogue that makes the activation of gate and up."""
    gate, up = sums
    tile.store(outputs[0], gate * jax.nn.sigmoid(gate) * up)


def _activate_and_keep(tile, sums, inputs, outputs) -> None:
    activate(tile, sums, inputs, outputs)
    for part, value in enumerate(sums):
        tile.store(outputs[1], value, part)


def _differentiate(tile, sums, inputs, outputs) -> None:
    """From the gradient of act that of gate and up, in the place of these."""
    (dact,) = sums
    gate, up = (inputs[0][part, tile.rows].astype(dact.dtype) for part in (0, 1))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    tile.store(outputs[0], dact * up * (sigmoid + silu * (1 - sigmoid)), 0)
    tile.store(outputs[0], dact * silu, 1)
