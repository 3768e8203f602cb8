"""The public op: two grouped matmuls around a gated activation, fused where that is faster."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target, varying
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu import xla
from pallas_kernels.grouped_swiglu.activation import gated


def _composed(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset):
    """Two grouped matmuls, each in the implementation for the platform compiled for."""
    matmul = functools.partial(grouped_matmul, group_offset=group_offset)
    hidden_RX = matmul(x_RD, gate_up_EDX, group_sizes_E)
    return matmul(gated(hidden_RX), down_EFD, group_sizes_E)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla.grouped_swiglu,
    "composed": _composed,
}
# By name: (target, *arrays) -> why this implementation does not serve the call, or None.
WHY_NOT = {"xla": xla.why_not}
# Tried in turn for each target a program may be compiled for. The last one takes every call.
AUTOMATIC_ORDER = ("xla", "composed")


def choices(*arrays) -> dict[target.Target, dispatch.Choice]:
    """For every target, what a call without a gradient takes, and why not the others."""
    return dispatch.choose(AUTOMATIC_ORDER, WHY_NOT, *arrays)


@jax.custom_vjp
def _automatic(*arrays):
    branches = {place: IMPLEMENTATIONS[choice.name] for place, choice in choices(*arrays).items()}
    return target.select(branches, *arrays)


def _forward(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset):
    # A gradient needs the hidden rows, which the fused form never has whole: writing them out
    # costs on a CPU what the fusion saves.
    def composed(x_RD, gate_up_EDX, down_EFD):
        return _composed(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset)

    return jax.vjp(composed, x_RD, gate_up_EDX, down_EFD)


def _backward(pull_back, dout_RD):
    return *pull_back(dout_RD), None, None


_automatic.defvjp(_forward, _backward)


def grouped_swiglu(
    x_RD: jax.Array,
    gate_up_EDX: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """down_e(silu(gate_e(x)) * up_e(x)) for the rows of each group e: out_RD, in x's dtype.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16. Any R, also 0.
      gate_up_EDX: gate and up side by side, X = 2F, in x's dtype.
      down_EFD: in x's dtype.
      group_sizes_E: as in grouped_matmul; rows past their sum give zeros.
      group_offset: as in grouped_matmul: where this call's groups begin in the two stacks.
      implementation: "xla" (block by block through both matmuls, so that the hidden rows never
        leave the cache; no gradient), "composed" (two grouped matmuls), or None: "xla" on CPUs
        where no gradient is taken, and "composed" otherwise.

    Raises:
      ValueError: shapes or dtypes that do not fit together; the message says which.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), SwiGLU without biases.
    """
    _check(x_RD, gate_up_EDX, down_EFD)
    if 0 in x_RD.shape or 0 in group_sizes_E.shape or 0 in down_EFD.shape:
        return _composed(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset)
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    if group_offset is not None:
        group_offset = group_offset.astype(jnp.int32)
    arrays = varying.alike(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset)
    if implementation is None:
        return _automatic(*arrays)
    return dispatch.call(
        "grouped_swiglu", IMPLEMENTATIONS, (), *arrays, implementation=implementation
    )


def _check(x, gate_up, down) -> None:
    """What the two grouped matmuls would not say, or not in these words."""
    for name, array in (("gate_up", gate_up), ("down", down)):
        if len(array.shape) != 3:
            raise ValueError(f"grouped_swiglu needs {name} of rank 3, got shape {array.shape}")
        if array.dtype != x.dtype:
            raise ValueError(
                f"grouped_swiglu needs {name} in x's dtype {x.dtype}, got {array.dtype}"
            )
    if gate_up.shape[2] != 2 * down.shape[1] or gate_up.shape[0] != down.shape[0]:
        raise ValueError(
            "grouped_swiglu needs gate_up [E, D, 2F] and down [E, F, D], got gate_up "
            f"{gate_up.shape} and down {down.shape}"
        )
