"""The product of activations with a weight, with a gradient whose operands stay as they lie."""

import functools

import jax
import qwix

from hybrid_jax.model import quantized
from hybrid_jax.model.lowrank import LowRank


def operand(w, dtype):
    """A weight as `project` takes it beside activations of this dtype: cast, unless quantised.

    What is quantised stays so until it is multiplied, and parts of it can be taken before.
    """
    return w if isinstance(w, qwix.QArray) else w.astype(dtype)


def project(x, w, num_in: int = 1):
    """x [..., in dims] times w [in dims, out dims]: [..., out dims], contracted over `num_in` dims.

    `w` is an array, a `LowRank`, or a `qwix.QArray`, which is an array from here on: XLA makes it
    of values and scales as the product reads it.
    """
    if isinstance(w, qwix.QArray):
        w = quantized.wide(w, x.dtype)
    if not isinstance(w, LowRank):
        return _project(x, w, num_in)
    thin = _project(_project(x, w.a, num_in), w.b, 1)
    return _project(x, w.weight, num_in) + w.scale * thin


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x, w, num_in: int = 1):
    """`project` for arrays.

    The gradient of w is written as x^T dy. JAX derives (dy^T x)^T, which on a CPU runs at half the
    speed (measured with 4096 tokens, 256 to 768 dims, float32: 92 against 182 GFLOP/s).
    """
    return _product(x, w, num_in)


def _product(x, w, num_in):
    contracted = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return jax.lax.dot_general(x, w, (contracted, ((), ())))


def _forward(x, w, num_in):
    # Not `_project`: a rematerialisation policy would see that, and not the matrix product in it.
    return _product(x, w, num_in), (x, w)


def _backward(num_in, residuals, dy):
    x, w = residuals
    lead = tuple(range(x.ndim - num_in))
    out_of_dy, out_of_w = tuple(range(len(lead), dy.ndim)), tuple(range(num_in, w.ndim))
    dx = jax.lax.dot_general(dy, w, ((out_of_dy, out_of_w), ((), ())))
    dw = jax.lax.dot_general(x, dy, ((lead, lead), ((), ())))
    return dx, dw


_project.defvjp(_forward, _backward)
