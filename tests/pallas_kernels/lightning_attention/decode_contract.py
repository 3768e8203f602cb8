"""What every implementation of decoding promises; a test class inherits `DecodeContract`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_decode, lightning_decode_slots, lightning_extend
from pallas_kernels.lightning_attention.cases import Case
from tests.pallas_kernels.lightning_attention import contract, oracle


class DecodeContract:
    """Inherit, and name the implementation; `interpret` and `case` where it needs them."""

    implementation: str
    interpret: Any = False
    case = Case(batch=3, length=1, heads=4, key_dim=8, value_dim=5)
    extended = 5

    def _options(self):
        return {"implementation": self.implementation, "interpret": self.interpret}

    def _token(self, dtype):
        inputs = contract.make_inputs(self.case, dtype=dtype)
        expected = oracle.attention(*inputs)
        return inputs, [x[:, 0] for x in (inputs.q, inputs.k, inputs.v)], expected

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_a_step_equals_the_recurrence(self, dtype):
        inputs, qkv, expected = self._token(dtype)
        out, state = lightning_decode(*qkv, inputs.log_decay, inputs.initial, **self._options())
        assert (out.dtype, state.dtype) == (dtype, jnp.float32)
        # Half a unit in the last of 8 bits where the output is rounded to bfloat16.
        rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.asarray(out, np.float64), expected.out[:, 0], rtol=rounding, atol=1e-4
        )
        np.testing.assert_allclose(state, expected.final, rtol=1e-5, atol=1e-5)

    def test_slots_are_stepped_in_place_and_others_kept(self):
        inputs, qkv, expected = self._token(jnp.float32)
        pool = np.random.default_rng(1).standard_normal((7, *inputs.initial.shape[1:]))
        pool = pool.astype(np.float32)
        # The last row's state in a late slot; no slot for the row in the middle.
        pool[5], pool[0] = inputs.initial[0], inputs.initial[2]
        out, new = lightning_decode_slots(
            *qkv, inputs.log_decay, pool, np.asarray([5, -1, 0]), **self._options()
        )
        assert not np.asarray(out[1]).any()
        np.testing.assert_allclose(out[::2], expected.out[::2, 0], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(new[5], expected.final[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new[0], expected.final[2], rtol=1e-5, atol=1e-5)
        kept = [1, 2, 3, 4, 6]
        np.testing.assert_array_equal(np.asarray(new)[kept], pool[kept])

    def test_rows_without_any_slot_change_nothing(self):
        inputs, qkv, _ = self._token(jnp.float32)
        pool = np.ones((2, *inputs.initial.shape[1:]), np.float32)
        out, new = lightning_decode_slots(
            *qkv, inputs.log_decay, pool, np.asarray([-1, 2, -1]), **self._options()
        )
        assert not np.asarray(out).any()
        np.testing.assert_array_equal(new, pool)

    def test_a_few_tokens_equal_the_recurrence(self):
        inputs = contract.make_inputs(self.case._replace(length=self.extended))
        expected = oracle.attention(*inputs)
        out, state = lightning_extend(
            inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.initial, **self._options()
        )
        found = expected._replace(out=out, final=state)
        contract.assert_close(found, expected)
