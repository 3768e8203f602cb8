"""The public op: checks its arguments, chooses an implementation, and owns the gradient."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, target, varying
from pallas_kernels.grouped_matmul import mosaic_gpu, pallas_tpu, ragged_dot, reference, xla

# The three matmuls of a module take group sizes [E] as int32:
#   forward(x_RD, w_EDF, group_sizes_E, group_offset) -> out_RF
#   input_gradient(dout_RF, w_EDF, group_sizes_E, group_offset) -> dx_RD
#   weight_gradient(x_RD, dout_RF, group_sizes_E) -> dw_EDF, of the groups of this call
MODULES: dict[str, ModuleType] = {
    "pallas_tpu": pallas_tpu,
    "ragged_dot": ragged_dot,
    "mosaic_gpu": mosaic_gpu,
    "xla": xla,
}
AUTOMATIC = tuple(MODULES)
WHY_NOT = {name: MODULES[name].why_not for name in AUTOMATIC if name != "xla"}

_choose = functools.partial(dispatch.choose, AUTOMATIC, WHY_NOT)


def _by_target(plan: dispatch.Plan, interpret: Any, product: str, *arrays) -> jax.Array:
    """One of the three matmuls, of the implementation named for the target compiled for.

    The choice is made inside each product, under the custom gradient: differentiating through it
    would keep residuals of every branch.
    """
    options = {"interpret": interpret} if interpret else {}
    branches = {
        name: functools.partial(getattr(MODULES[name], product), **options)
        for name in set(plan.names)
    }
    by_target = zip(target.TARGETS, (branches[name] for name in plan.names), strict=True)
    return target.select(dict(by_target), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(plan: dispatch.Plan, interpret: Any, *arrays):
    return _forward(plan, interpret, *arrays)[0]


def _forward(plan, interpret, x_RD, *others):
    x_RD = target.announce(plan.notes, x_RD)
    return _by_target(plan, interpret, "forward", x_RD, *others), (x_RD, *others)


def _backward(plan, interpret, residuals, dout_RF):
    x_RD, w_EDF, group_sizes_E, group_offset = residuals
    back = functools.partial(_by_target, plan, interpret)
    dx_RD = back("input_gradient", dout_RF, w_EDF, group_sizes_E, group_offset)
    dw_EDF = back("weight_gradient", x_RD, dout_RF, group_sizes_E)
    return dx_RD, among_all(dw_EDF, w_EDF, group_offset), None, None


_with_gradient.defvjp(_forward, _backward)


def _automatic(x_RD, w_EDF, group_sizes_E, group_offset) -> dispatch.Plan:
    slow = "xla" if x_RD.shape[0] >= mosaic_gpu.LEAST_ROWS * group_sizes_E.shape[0] else None
    choices = _choose(x_RD, w_EDF, group_sizes_E, group_offset)
    return dispatch.plan("grouped_matmul", choices, slow=slow)


def gradients(
    x_RD, w_EDF, group_sizes_E, dout_RF, *, group_offset=None
) -> tuple[jax.Array, jax.Array]:
    """What the automatic choice's gradient rule gives for x and w; arguments are not checked."""
    arrays = x_RD, w_EDF, group_sizes_E, group_offset
    return _backward(_automatic(*arrays), False, arrays, dout_RF)[:2]


def among_all(dw_EDF, w_EDF, group_offset) -> jax.Array:
    """The gradient of all matrices of w from that of a call's groups; of others it is zero."""
    if group_offset is None:
        return dw_EDF
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(w_EDF), dw_EDF, group_offset, axis=0)


def _named(name: str) -> Callable[..., jax.Array]:
    """The op by one implementation, whatever the target."""

    def multiply(*arrays, interpret):
        if not interpret:
            dispatch.demand(WHY_NOT.get(name), *arrays)
        return _with_gradient(dispatch.named(name), interpret, *arrays)

    return multiply


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    **{name: _named(name) for name in MODULES},
    "reference": lambda *arrays, interpret: reference.grouped_matmul(*arrays),
}
DTYPES = ("float32", "bfloat16")


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Multiply each group of consecutive rows by its own matrix: out_RF, in x's dtype.

    The first group_sizes_E[0] rows are multiplied by w_EDF[0], the next group_sizes_E[1] rows by
    w_EDF[1] and so on. Rows past the sum of the sizes give zeros and get zero gradients, whatever
    they hold. Sums are float32. The gradient is for x and w.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16. Any R, also 0.
      w_EDF: one matrix a group, in x's dtype.
      group_sizes_E: integers >= 0, traced or not; their sum is at most R. Groups may be empty, and
        the matrix of an empty group is not read.
      group_offset: None, or an integer scalar: group e then uses w_EDF[group_offset + e]. So w may
        hold the groups of all layers: a scan that slices out one layer would copy all its groups,
        this reads only those with rows, which is what counts in decode.
      implementation: "pallas_tpu", "ragged_dot" (jax.lax.ragged_dot), "mosaic_gpu" (JAX's kernels
        for Hopper), "xla", "reference", or None for the first of them that can serve the call on
        the target compiled for; `choices` says which. "ragged_dot" works on every platform, but
        off TPU it multiplies every row by every matrix, and on TPUs too for the gradient of w.
      interpret: True or interpret parameters of Pallas, with "pallas_tpu" named.

    Raises:
      ValueError: shapes or dtypes that do not fit together; the message says which.
      Unsupported: the implementation that was named cannot serve this call.

    Source: Gale et al., MegaBlocks (arXiv 2211.15841), for dropless experts as a grouped matmul.
    """
    _check(x_RD, w_EDF, group_sizes_E, group_offset)
    check_interpret("grouped_matmul", implementation, interpret)
    if 0 in x_RD.shape or 0 in w_EDF.shape or 0 in group_sizes_E.shape:
        return jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype)
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    if group_offset is not None:
        group_offset = group_offset.astype(jnp.int32)
    arrays = varying.alike(x_RD, w_EDF, group_sizes_E, group_offset)
    if implementation is None:
        return _with_gradient(_automatic(*arrays), False, *arrays)
    return dispatch.call(
        "grouped_matmul", IMPLEMENTATIONS, (), *arrays,
        implementation=implementation, interpret=interpret,
    )  # fmt: skip


def choices(
    x_RD, w_EDF, group_sizes_E, *, group_offset=None
) -> dict[target.Target, dispatch.Choice]:
    """What the automatic choice takes on each target, and why; arrays may be abstract."""
    return _choose(x_RD, w_EDF, group_sizes_E, group_offset)


def check_interpret(op_name: str, implementation: str | None, interpret: Any) -> None:
    """Only what is named and is a kernel of Pallas can be interpreted."""
    if interpret and implementation != "pallas_tpu":
        raise ValueError(
            f"{op_name} can interpret its implementation 'pallas_tpu' alone, got {implementation!r}"
        )


def _check(x, w, sizes, offset) -> None:
    """Ranks, dtypes and the dims the arguments share."""
    for name, array, dims in (
        ("x", x, "R D"),
        ("w", w, "E D F"),
        ("group_sizes", sizes, "E"),
        ("group_offset", offset, ""),
    ):
        if array is not None and len(array.shape) != len(dims.split()):
            raise ValueError(
                f"grouped_matmul needs {name} of shape [{dims}], got shape {array.shape}"
            )
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        raise ValueError(
            f"grouped_matmul needs x and w of one dtype out of {', '.join(DTYPES)}, got x "
            f"{x.dtype} and w {w.dtype}; cast one of them"
        )
    for name, array in (("group_sizes", sizes), ("group_offset", offset)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"grouped_matmul needs integer {name}, got {array.dtype}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped_matmul contracts dim 1 of x with dim 1 of w, got x {x.shape} and w {w.shape}"
        )
    if sizes.shape[0] > w.shape[0] or (offset is None and sizes.shape[0] != w.shape[0]):
        raise ValueError(
            f"grouped_matmul needs one group size a matrix of w, got {sizes.shape[0]} sizes and "
            f"w {w.shape}; give group_offset if w holds more matrices than this call has groups"
        )
