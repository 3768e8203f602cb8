"""The token by token definition keeps the contract, and float64 where it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lightning_attention
from pallas_kernels.lightning_attention.cases import CASES
from tests.pallas_kernels.lightning_attention import contract, oracle


class TestReference(contract.Contract):
    """Token by token."""

    implementation = "reference"


def test_float64_inputs_are_computed_in_float64():
    ids = contract.packed_ids(CASES["odd"].length)
    inputs = contract.make_inputs(CASES["odd"]._replace(batch=len(ids)), ids)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in inputs[:3])
        out, final = lightning_attention(
            q, k, v, inputs.log_decay, initial_state=inputs.initial,
            segment_ids=inputs.ids, implementation="reference",
        )  # fmt: skip
    expected = oracle.attention(*inputs)
    # log_decay is float32 on entry in both; what differs is the order of float64 sums.
    np.testing.assert_allclose(out, expected.out, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(final, expected.final, rtol=1e-11, atol=1e-12)
