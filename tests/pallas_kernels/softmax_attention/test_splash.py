"""Splash attention behind our layout: its numbers in Pallas's interpreter, its tables, its limits.

The interpreter for TPUs, which finds races, does not take a kernel under vmap (jax 0.12); the plain
one does. That the kernel compiles for TPUs is in test_compiled.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from pallas_kernels import softmax_attention
from pallas_kernels.errors import Unsupported
from pallas_kernels.softmax_attention import splash
from pallas_kernels.softmax_attention.cases import Case
from tests.pallas_kernels.softmax_attention import contract, oracle

CASE = Case(B=2, T=256, S=256, H=4, G=2, K=64, V=64)


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel's body on the CPU."""
    options = splash._options
    monkeypatch.setattr(splash, "_options", lambda *args: {**options(*args), "interpret": True})


def run(inputs: contract.Inputs, *, with_ids: bool) -> oracle.Results:
    """All results, by splash attention, of a call from the first key on."""
    ids = {"q_segment_ids": inputs.q_ids, "kv_segment_ids": inputs.kv_ids} if with_ids else {}

    @jax.jit
    def results(q, k, v, d_out):
        out, pullback = jax.vjp(
            lambda *qkv: softmax_attention(*qkv, implementation="splash", **ids), q, k, v
        )
        return out, *pullback(d_out)

    return oracle.Results(*results(inputs.q, inputs.k, inputs.v, inputs.d_out))


def make_inputs(*, packed: bool, dtype=jnp.float32) -> contract.Inputs:
    inputs = contract.make_inputs(CASE, packed=packed, dtype=dtype)
    return inputs._replace(offset=np.zeros(CASE.B, np.int32), q_ids=inputs.kv_ids)


@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients(interpreted, packed):
    inputs = make_inputs(packed=packed)
    found = run(inputs, with_ids=packed)
    contract.assert_close(found, oracle.attention(*inputs))


def test_bfloat16_loses_no_more_than_its_own_rounding(interpreted):
    inputs = make_inputs(packed=True, dtype=jnp.bfloat16)
    found = run(inputs, with_ids=True)
    assert {x.dtype.name for x in found} == {"bfloat16"}
    contract.assert_close(found, oracle.attention(*inputs), contract.BF16_TOLERANCE)


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(interpreted):
    inputs = make_inputs(packed=False)
    # The first row is padding, the second a document without keys. Scores of 1e6 would overflow.
    inputs = inputs._replace(
        q=inputs.q * 1e3,
        k=inputs.k * 1e3,
        q_ids=np.repeat([[0], [9]], CASE.T, axis=1).astype(np.int32),
        kv_ids=np.repeat([[0], [1]], CASE.T, axis=1).astype(np.int32),
    )
    assert all((np.asarray(x) == 0).all() for x in run(inputs, with_ids=True))


@pytest.mark.parametrize("length", [128, 1536])
def test_the_tables_are_those_that_jax_finds_from_all_scores(length):
    size = splash._block(length)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))])
    queries, keys, _ = splash._causal_tables(length)
    expected = (
        mask_info.process_mask(mask, (size, size))[0],
        mask_info.process_mask_dkv(mask, (size, size))[0],
    )
    for ours, theirs in zip((queries, keys), expected, strict=True):
        np.testing.assert_array_equal(ours.data_next, theirs.data_next)
        np.testing.assert_array_equal(ours.block_mask > 0, theirs.block_mask > 0)
        np.testing.assert_array_equal(ours.q_sequence, theirs.q_sequence)
        assert ours.partial_mask_blocks is None and theirs.partial_mask_blocks is None


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason():
    q, kv = jnp.zeros((1, 100, 4, 64)), jnp.zeros((1, 100, 2, 64))
    with pytest.raises(Unsupported, match=r"for tpu: .* T as a multiple of 128"):
        softmax_attention(q, kv, kv, implementation="splash")
    with pytest.raises(Unsupported, match=r"for tpu: .* takes whole rows"):
        offset = jnp.zeros(1, jnp.int32)
        softmax_attention(q, kv, kv, q_offset=offset, implementation="splash")
