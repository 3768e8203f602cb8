"""The one gradient rule of lightning attention: a forward and a backward pass of any kind."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.lightning_attention import xla


class Passes(NamedTuple):
    """The two passes of one implementation, on arrays that have been checked."""

    forward: Callable[..., tuple[jax.Array, ...]]
    """(q, k, v, log_decay, initial_state, segment_ids) -> (out, final_state)"""
    backward: Callable[..., tuple[jax.Array, ...]]
    """(the same six, dout, dfinal_state) -> (dq, dk, dv, dinitial_state)"""


# The rule lies around the choice of implementation: differentiating through a choice by platform
# would keep residuals of every branch.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    passes: Passes, q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT
) -> tuple[jax.Array, ...]:
    """Out and final state, with gradients for the five floating arguments."""
    return passes.forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, state_BHKV, segment_ids_BT)


def _forward(passes, *arrays):
    return passes.forward(*arrays), arrays


def _backward(passes, arrays, cotangents):
    dq_BTHK, dk_BTHK, dv_BTHV, dstate_BHKV = passes.backward(*arrays, *cotangents)
    # The decays are constants of almost every model, and the compiler drops this where nobody asks.
    # The sum over t of t (q_t dq_t - k_t dk_t) would be cheaper and is no substitute: its terms
    # cancel, and of a bfloat16 dq and dk nothing is left after some hundred tokens.
    dlog_decay_H = xla.decay_gradient(*arrays, *cotangents)
    return dq_BTHK, dk_BTHK, dv_BTHV, dlog_decay_H, dstate_BHKV, None


_attend.defvjp(_forward, _backward)
attend = jax.jit(_attend, static_argnums=0)
