"""States without outputs are those of the whole op, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_state, lightning_state_gradient
from pallas_kernels.lightning_attention import pallas_tpu, state_xla
from pallas_kernels.lightning_attention.cases import CASES, Case
from tests.pallas_kernels.lightning_attention import contract, oracle, text_01

# Both passes; the chunk of 64 makes two whole ones and a part.
_PASSES = {
    "xla": [functools.partial(f, chunk=64) for f in (state_xla.forward, state_xla.backward)],
    "pallas_tpu": [
        functools.partial(f, interpret=True)
        for f in (pallas_tpu.state_forward, pallas_tpu.state_backward)
    ],
}


def _ends_at_zero(inputs: contract.Inputs) -> contract.Inputs:
    """No state before the first token, and no gradient of the one after the last."""
    zeros = np.zeros_like(inputs.initial)
    return inputs._replace(initial=zeros, dfinal=zeros)


def _assert_passes(name, inputs, *, with_ids=True, tolerance=contract.TOLERANCE):
    forward, backward = (jax.jit(one) for one in _PASSES[name])
    q, k, v, log_decay, zeros, ids, dout, _ = (jnp.asarray(x) for x in inputs)
    ids = ids if with_ids else None
    expected = oracle.attention(*inputs)
    # As if everything else were right.
    found = expected._replace(
        final=forward(k, v, log_decay, zeros, ids),
        dinitial=backward(q, dout, log_decay, zeros, ids),
    )
    contract.assert_close(found, expected, tolerance)


@pytest.mark.parametrize("name", _PASSES)
def test_one_segment(name):
    _assert_passes(name, _ends_at_zero(contract.make_inputs(CASES["odd"])), with_ids=False)


@pytest.mark.parametrize("name", _PASSES)
def test_packed_rows_with_padding_that_holds_anything(name):
    ids = contract.packed_ids(CASES["odd"].length)
    inputs = contract.make_inputs(CASES["odd"]._replace(batch=len(ids)), ids)
    is_real = (ids != 0)[:, :, None, None]
    spoilt = {x: jnp.where(is_real, getattr(inputs, x), jnp.nan) for x in ("q", "k", "v", "dout")}
    _assert_passes(name, _ends_at_zero(inputs._replace(**spoilt)))


def test_tpu_tiles_of_bfloat16():
    slopes = text_01.slopes(0, range(0, 64, 4))
    inputs = text_01.make_inputs(Case(1, 300, 16, 128, 128), slopes)
    # Decayed keys are rounded to 8 bits before they are multiplied, as in the whole op.
    _assert_passes("pallas_tpu", _ends_at_zero(inputs), with_ids=False, tolerance=2**-8)


@pytest.mark.parametrize("name", _PASSES)
def test_no_token_leaves_zeros(name):
    inputs = contract.make_inputs(CASES["odd"]._replace(length=0))
    _assert_passes(name, _ends_at_zero(inputs))


def test_the_public_functions_check_their_arguments():
    x = jnp.ones((1, 4, 2, 8))
    assert lightning_state(x, x, -np.ones(2, np.float32)).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="for slopes s > 0 pass -s"):
        lightning_state(x, x, np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"segment_ids must have shape \[1, 4\]"):
        lightning_state_gradient(x, x, np.zeros(2), segment_ids=np.ones((1, 5), np.int32))
