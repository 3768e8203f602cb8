"""The public op: two grouped matmuls around a gated activation, fused where that is faster."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, target, varying
from pallas_kernels.grouped_matmul.api import check_interpret
from pallas_kernels.grouped_swiglu import composed, pallas_tpu, xla

# By name: (target, *arrays) -> why this implementation does not serve the call, or None.
WHY_NOT = {"pallas_tpu": pallas_tpu.why_not, "xla": xla.why_not}
# Tried in turn for each target a program may be compiled for. The last one takes every call.
AUTOMATIC_ORDER = ("pallas_tpu", "xla", "composed")
# With a gradient: the hidden rows are kept, which "xla" never has whole. Writing them out costs on
# a CPU what the fusion saves.
_MODULES = {"pallas_tpu": pallas_tpu, "composed": composed}


def choices(*arrays) -> dict[target.Target, dispatch.Choice]:
    """For every target, what a call without a gradient takes, and why not the others."""
    return dispatch.choose(AUTOMATIC_ORDER, WHY_NOT, *arrays)


def _select(pass_name: str, interpret: Any, implementation: str | None, call, *more):
    """A pass for the target compiled for, or of the implementation named."""
    if implementation is not None:
        options = {"interpret": interpret} if interpret else {}
        return getattr(_MODULES[implementation], pass_name)(*call, *more, **options)
    branches = {
        place: getattr(_MODULES.get(choice.name, composed), pass_name)
        for place, choice in choices(*call).items()
    }
    return target.select(branches, *call, *more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(implementation: str | None, interpret: Any, *arrays):
    if implementation is not None:
        return _select("grouped_swiglu", interpret, implementation, arrays)
    modules = _MODULES | {"xla": xla}
    branches = {
        place: modules[choice.name].grouped_swiglu for place, choice in choices(*arrays).items()
    }
    return target.select(branches, *arrays)


def _forward(implementation, interpret, *arrays):
    out_RD, *kept = _select("forward", interpret, implementation, arrays)
    return out_RD, (arrays, kept)


def _backward(implementation, interpret, residuals, dout_RD):
    arrays, kept = residuals
    gradients = _select("backward", interpret, implementation, arrays, *kept, dout_RD)
    return *gradients, None, None


_with_gradient.defvjp(_forward, _backward)


def _kernels(*arrays, interpret):
    if not interpret:
        dispatch.demand(pallas_tpu.why_not, *arrays)
    return _with_gradient("pallas_tpu", interpret, *arrays)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "pallas_tpu": _kernels,
    "xla": lambda *arrays, interpret: xla.grouped_swiglu(*arrays),
    "composed": lambda *arrays, interpret: composed.grouped_swiglu(*arrays),
}


def grouped_swiglu(
    x_RD: jax.Array,
    gate_up_EDX: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """down_e(silu(gate_e(x)) * up_e(x)) for the rows of each group e: out_RD, in x's dtype.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16. Any R, also 0.
      gate_up_EDX: gate and up side by side, X = 2F, in x's dtype.
      down_EFD: in x's dtype.
      group_sizes_E: as in grouped_matmul; rows past their sum give zeros.
      group_offset: as in grouped_matmul: where this call's groups begin in the two stacks.
      implementation: "pallas_tpu" (the gate in the kernels of the products), "xla" (block by block
        through both matmuls, so that the hidden rows never leave the cache; no gradient),
        "composed" (two grouped matmuls), or None: the kernels on TPUs, if they can serve the call,
        "xla" on CPUs where no gradient is taken, and "composed" otherwise.
      interpret: True or interpret parameters of Pallas, with "pallas_tpu" named.

    Raises:
      ValueError: shapes or dtypes that do not fit together; the message says which.
      Unsupported: the implementation that was named cannot serve this call.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), SwiGLU without biases.
    """
    _check(x_RD, gate_up_EDX, down_EFD)
    check_interpret("grouped_swiglu", implementation, interpret)
    if 0 in x_RD.shape or 0 in group_sizes_E.shape or 0 in down_EFD.shape:
        return composed.grouped_swiglu(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset)
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    if group_offset is not None:
        group_offset = group_offset.astype(jnp.int32)
    arrays = varying.alike(x_RD, gate_up_EDX, down_EFD, group_sizes_E, group_offset)
    if implementation is None:
        return _with_gradient(None, False, *arrays)
    return dispatch.call(
        "grouped_swiglu", IMPLEMENTATIONS, (), *arrays,
        implementation=implementation, interpret=interpret,
    )  # fmt: skip


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
