"""Decoding: the contract in plain XLA, what is refused, and the pool updated where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_decode_slots, lightning_extend
from tests.pallas_kernels.lightning_attention import decode_contract

_Q, _POOL, _DECAYS = jnp.ones((2, 4, 8)), jnp.ones((3, 4, 8, 8)), np.zeros(4, np.float32)


class TestXla(decode_contract.DecodeContract):
    """Gather, step, scatter."""

    implementation = "xla"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": _POOL[0]}, r"pool must have shape \[S, 4, 8, 8\]"),
        ({"pool": _POOL.astype(jnp.bfloat16)}, "pool must be float32"),
        ({"slots": np.zeros(3, np.int32)}, r"slots must have shape \[2\]"),
        ({"slots": np.zeros(2, np.float32)}, "slots must be integers"),
        ({"implementation": "cudnn"}, "'cudnn'; choose one of 'xla'"),
        ({"interpret": True}, "nothing to interpret"),
    ],
)
def test_a_mistake_with_a_pool_is_named(changes, words):
    arguments = {"pool": _POOL, "slots": np.zeros(2, np.int32)} | changes
    with pytest.raises(ValueError, match=words):
        lightning_decode_slots(_Q, _Q, _Q, _DECAYS, **arguments)


def test_no_row_and_no_token_return_what_they_got():
    out, pool = lightning_decode_slots(
        _Q[:0], _Q[:0], _Q[:0], _DECAYS, _POOL, np.zeros(0, np.int32)
    )
    assert out.shape == (0, 4, 8)
    np.testing.assert_array_equal(pool, _POOL)
    none = jnp.ones((2, 0, 4, 8))
    out, state = lightning_extend(none, none, none, _DECAYS, _POOL[:2])
    assert out.shape == (2, 0, 4, 8)
    np.testing.assert_array_equal(state, _POOL[:2])


def test_a_donated_pool_is_not_copied():
    def step(pool, slots):
        return lightning_decode_slots(_Q, _Q, _Q, _DECAYS, pool, slots)

    pool = jax.ShapeDtypeStruct((1000, 4, 8, 8), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, jnp.zeros(2, jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * pool.size
    assert memory.temp_size_in_bytes < pool.size
