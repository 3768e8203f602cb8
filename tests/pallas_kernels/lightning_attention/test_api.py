"""What the public function refuses, with what words, and the single decode step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention, lightning_decode, lightning_state
from pallas_kernels.lightning_attention import api
from pallas_kernels.lightning_attention.cases import CASES
from tests.pallas_kernels.lightning_attention import contract

_INPUTS = contract.make_inputs(CASES["odd"])


def _call(implementation=None, interpret=False, **changes):
    inputs = _INPUTS._replace(**changes)
    return lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.log_decay, initial_state=inputs.initial,
        segment_ids=inputs.ids, implementation=implementation, interpret=interpret,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": _INPUTS.q[0]}, r"q must have shape \[B, T, H, K\]"),
        ({"k": _INPUTS.k[:, :-1]}, r"k must have shape \[2, 149, 4, 8\].*got \[2, 148, 4, 8\]"),
        ({"v": _INPUTS.v[:, :, :3]}, r"v must have shape \[2, 149, 4, 5\].*got \[2, 149, 3, 5\]"),
        ({"v": _INPUTS.v[0]}, r"v must have shape \[2, 149, 4, V\]"),
        ({"q": _INPUTS.q.astype(jnp.int32)}, "q must be floating, got int32"),
        ({"log_decay": _INPUTS.log_decay[:3]}, r"log_decay must have shape \[4\]"),
        ({"log_decay": -_INPUTS.log_decay}, "finite and <= 0.*for slopes s > 0 pass -s"),
        ({"log_decay": _INPUTS.log_decay + np.nan}, "finite and <= 0"),
        ({"initial": _INPUTS.initial.swapaxes(2, 3)}, r"initial_state must have.*\[2, 4, 8, 5\]"),
        ({"ids": _INPUTS.ids[:, 1:]}, r"segment_ids must have shape \[2, 149\]"),
        ({"ids": _INPUTS.ids.astype(np.float32)}, "segment_ids must be integers"),
        ({"implementation": "cudnn"}, "'cudnn'; choose one of 'reference', 'xla'"),
        ({"interpret": True}, "nothing to interpret"),
        ({"interpret": True, "implementation": "xla"}, "nothing to interpret"),
    ],
)
def test_a_mistake_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        _call(**changes)


def test_no_initial_state_is_zeros_and_no_ids_are_one_segment():
    plain = lightning_attention(_INPUTS.q, _INPUTS.k, _INPUTS.v, _INPUTS.log_decay)
    spelled = _call(initial=np.zeros_like(_INPUTS.initial))
    for ours, theirs in zip(plain, spelled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_token_by_token_equals_the_whole(dtype):
    inputs = contract.make_inputs(CASES["odd"], dtype=dtype)
    out, final = lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.log_decay, initial_state=inputs.initial
    )

    def step(state, qkv):
        out, state = lightning_decode(*qkv, inputs.log_decay, state)
        return state, out

    qkv = tuple(jnp.moveaxis(x, 1, 0) for x in (inputs.q, inputs.k, inputs.v))
    state, steps = jax.jit(lambda state, qkv: jax.lax.scan(step, state, qkv))(inputs.initial, qkv)
    assert steps.dtype == dtype and state.dtype == jnp.float32
    # Both round float32 sums of the same numbers; bfloat16 may round them to neighbours.
    ours, theirs = np.asarray(jnp.moveaxis(steps, 0, 1), np.float64), np.asarray(out, np.float64)
    np.testing.assert_allclose(
        ours, theirs, rtol=2.0**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-3
    )
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-3)


def test_a_decode_mistake_is_named():
    q, state = jnp.ones((2, 4, 8)), jnp.ones((2, 4, 8, 5))
    with pytest.raises(ValueError, match=r"state must have shape \[2, 4, 8, 6\]"):
        lightning_decode(q, q, jnp.ones((2, 4, 6)), _INPUTS.log_decay, state)
    with pytest.raises(ValueError, match=r"q must have shape \[B, H, K\]"):
        lightning_decode(_INPUTS.q, q, jnp.ones((2, 4, 5)), _INPUTS.log_decay, state)


def test_inside_shard_map_replicated_decays_get_their_whole_gradient():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def attend(q, k, v, log_decay):
        return lightning_attention(q, k, v, log_decay)[0]

    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(split, split, split, whole), out_specs=split
    )
    q, k, v, log_decay = _INPUTS[:4]
    # Checks that the loops' carries vary as their results do, which one device suffices to see.
    ours, theirs = (
        jax.jit(jax.grad(lambda decays, f=f: f(q, k, v, decays).sum()))(jnp.asarray(log_decay))
        for f in (sharded, attend)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_every_kernel_can_be_traced_inside_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def results(q, k, v, ids, log_decay):
        def attend(q, k, v):
            return lightning_attention(q, k, v, log_decay, segment_ids=ids)

        found, pullback = jax.vjp(attend, q, k, v)
        states = lightning_state(k, v, log_decay, segment_ids=ids)
        return *found, states, *pullback(found)

    sharded = jax.shard_map(results, mesh=mesh, in_specs=(*[split] * 4, whole), out_specs=split)
    # Heads that the kernels of all targets take: each is traced, whatever the target.
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    assert api.choices(x, x, x)["hopper"].name == "pallas_gpu"
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    decays = jax.ShapeDtypeStruct((2,), jnp.float32)
    for ids_or_none in (None, ids):
        assert jax.eval_shape(sharded, x, x, x, ids_or_none, decays)[0].dtype == jnp.bfloat16
