"""The three matmuls of the op, by the two kernels."""

from typing import Any

import jax

from pallas_kernels.grouped_matmul.pallas_tpu import matrices, rows

# Widths come in whole rows of lanes, and a tile of fewer rows would be mostly padding.
_UNIT = 128


def why_not(target, x_RD, w_EDF, group_sizes_E, group_offset=None) -> str | None:
    """Why these kernels cannot serve this call on this target; None if they can."""
    del group_sizes_E, group_offset
    R, (_, D, F) = x_RD.shape[0], w_EDF.shape
    if target != "tpu":
        return "Mosaic TPU kernels run on TPUs"
    if D % _UNIT or F % _UNIT:
        return f"the TPU kernels need widths of a multiple of {_UNIT}, got {D} and {F}"
    if R < _UNIT:
        return f"the TPU kernels multiply {_UNIT} rows at once, got {R}"
    return None


def forward(x_RD, w_EDF, group_sizes_E, group_offset, *, interpret: Any = False) -> jax.Array:
    """out_RF as in api.grouped_matmul."""
    F = w_EDF.shape[2]
    return _multiply(x_RD, w_EDF, F, group_sizes_E, group_offset, False, interpret)


def input_gradient(
    dout_RF, w_EDF, group_sizes_E, group_offset, *, interpret: Any = False
) -> jax.Array:
    """dx_RD: each row of dout times the transposed matrix of its group."""
    D = w_EDF.shape[1]
    return _multiply(dout_RF, w_EDF, D, group_sizes_E, group_offset, True, interpret)


def weight_gradient(x_RD, dout_RF, group_sizes_E, *, interpret: Any = False) -> jax.Array:
    """dw_EDF: for each group, the transposed rows of x times the rows of dout."""
    return matrices.multiply(
        x_RD, dout_RF[None], group_sizes_E, name="grouped_matmul_weight", interpret=interpret
    )


def _multiply(rows_RX, w_EDF, columns, group_sizes_E, group_offset, transposed, interpret):
    product = rows.Product(
        "grouped_matmul_transposed" if transposed else "grouped_matmul",
        sums=(((0, 0),),), epilogue=rows.store_sum, transposed=transposed, clears=True,
    )  # fmt: skip
    out = jax.ShapeDtypeStruct((rows_RX.shape[0], columns), rows_RX.dtype)
    factors = [rows.Factor(rows_RX)], [rows.Factor(w_EDF)]
    (out_RY,) = rows.multiply(
        product, *factors, [], [out], group_sizes_E, group_offset, interpret=interpret
    )
    return out_RY
