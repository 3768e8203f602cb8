"""Blocks of keys, attended to one by one and merged, give the attention to all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import (
    softmax_attention,
    softmax_attention_block,
    softmax_attention_block_gradients,
)
from pallas_kernels.errors import Unsupported
from pallas_kernels.softmax_attention import splash
from pallas_kernels.softmax_attention.cases import Case
from tests.pallas_kernels.softmax_attention import contract, oracle

# 128 queries after as many keys, before which nothing is hidden by order.
CASE = Case(B=2, T=128, S=256, H=4, G=2, K=64, V=64, offset=128)
BLOCKS = ((slice(0, 128), False), (slice(128, 256), True))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the body of a TPU kernel on the CPU."""
    options = splash._options
    monkeypatch.setattr(splash, "_options", lambda *args: {**options(*args), "interpret": True})


def make_inputs(*, packed: bool) -> contract.Inputs:
    """If packed, the second row has a document without earlier keys, and padding that could see."""
    inputs = contract.make_inputs(CASE, packed=False)
    ids = np.ones((2, 256), np.int32)
    if packed:
        ids[0] = np.repeat([1, 2, 0, 3], [100, 60, 20, 76])
        ids[1] = np.repeat([1, 0, 2, 0], [90, 50, 86, 30])
    return inputs._replace(kv_ids=ids, q_ids=ids[:, 128:], offset=np.full(2, 128, np.int32))


def merged(implementation, inputs, *, packed: bool):
    """All results, and the logsumexp of each block."""
    q, d_out = inputs.q, inputs.d_out

    def arguments(keys, causal):
        options = {"causal": causal, "implementation": implementation}
        if packed:
            options |= {"q_segment_ids": inputs.q_ids, "kv_segment_ids": inputs.kv_ids[:, keys]}
        return (q, inputs.k[:, keys], inputs.v[:, keys]), options

    calls = [arguments(*block) for block in BLOCKS]
    parts = [softmax_attention_block(*arrays, **options) for arrays, options in calls]
    outs, sums = zip(*parts, strict=True)
    total = jnp.logaddexp(*sums)
    out = sum(jnp.exp(one - total)[..., None] * part for part, one in zip(outs, sums))
    gradients = [
        softmax_attention_block_gradients(*arrays, out, total, d_out, **options)
        for arrays, options in calls
    ]
    dq, dk, dv = zip(*gradients, strict=True)
    results = oracle.Results(out, sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1))
    return results, sums


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["splash", "xla"])
def test_two_blocks_give_outputs_and_gradients_of_all_keys(implementation, packed):
    inputs = make_inputs(packed=packed)
    found, sums = merged(implementation, inputs, packed=packed)
    contract.assert_close(found, oracle.attention(*inputs))
    if packed:
        unseen = inputs.q_ids == 0
        assert all((np.asarray(one)[unseen] <= -1e29).all() for one in sums)
        assert all(np.isfinite(one).all() for one in sums)


def test_the_automatic_choice_takes_blocks_on_a_cpu():
    inputs = make_inputs(packed=True)
    by_name, _ = merged("xla", inputs, packed=True)
    chosen, _ = merged(None, inputs, packed=True)
    for ours, theirs in zip(chosen, by_name, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_call_that_it_cannot_serve_is_refused_with_the_reason():
    x = jnp.zeros((1, 100, 2, 64))
    with pytest.raises(Unsupported, match="T as a multiple of 128"):
        softmax_attention_block(x, x, x, causal=False, implementation="splash")
    with pytest.raises(
        ValueError, match="no implementation 'cudnn'; choose one of 'splash', 'xla'"
    ):
        softmax_attention_block(x, x, x, causal=False, implementation="cudnn")
    with pytest.raises(ValueError, match=r"at least one query and key, got q \(1, 0, 2, 64\)"):
        softmax_attention_block(x[:, :0], x, x, causal=False)


def test_inside_shard_map_a_checkpoint_may_stand_around_it():
    """What JAX checks there, it would check again in a part of the kernel that it traces anew."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")
    inputs = contract.make_inputs(Case(B=2, T=16, S=16, H=2, G=1, K=8, V=8), packed=False)
    q, k = inputs.q, inputs.k
    ids = jnp.ones((2, 16), jnp.int32)

    def local(q, k, ids):
        return softmax_attention(q, k, k, q_segment_ids=ids, kv_segment_ids=ids)

    split = jax.checkpoint(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))

    def loss(attend, k):
        return jnp.sum(attend(q, k, ids) ** 2)

    expected, found = (
        jax.jit(jax.grad(functools.partial(loss, attend)))(k) for attend in (local, split)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
