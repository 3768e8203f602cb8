"""Lightning attention split over time equals the recurrence, and shards exchange states alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hybrid_jax.model import remat
from hybrid_jax.model.parallel import lightning
from pallas_kernels.lightning_attention.cases import Case
from tests.model.parallel import collectives
from tests.pallas_kernels.lightning_attention import contract, oracle

# Eight shards of 20 tokens, four of 40, two of 80.
_CASE = Case(batch=2, length=160, heads=4, key_dim=8, value_dim=5)
_TIME, _STATE = P("data", "sequence", "tensor"), P("data", None, "tensor")
_SPLIT_BY_ROLE = {
    "q": _TIME, "k": _TIME, "v": _TIME, "log_decay": P("tensor"), "initial": P("data", "tensor"),
    "ids": P("data"), "dout": _TIME, "dfinal": P("data", "tensor"),
}  # fmt: skip


def _mesh(**sizes):
    """Simulated devices; axes that are not named have one."""
    sizes = {"data": 1, "sequence": 1, "tensor": 1} | sizes
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _split(mesh, **options):
    """The split op as a function of whole arrays."""
    specs = [_SPLIT_BY_ROLE[name] for name in ("q", "k", "v", "log_decay", "initial", "ids")]

    def attend(q, k, v, log_decay, initial, ids):
        return lightning.lightning_attention(
            q, k, v, log_decay, axis="sequence", initial_state_BHKV=initial, segment_ids_BT=ids
        )

    return jax.shard_map(
        attend, mesh=mesh, in_specs=tuple(specs), out_specs=(_TIME, P("data", "tensor")), **options
    )


@functools.cache
def _results(sizes, with_ids=True, with_initial=True):
    """All results and gradients of an `Inputs`, compiled for a mesh."""
    attend = _split(_mesh(**dict(sizes)))

    @jax.jit
    def results(q, k, v, log_decay, initial, ids, dout, dfinal):
        def of_floats(q, k, v, log_decay, initial):
            ids_or_none = ids if with_ids else None
            return attend(q, k, v, log_decay, initial if with_initial else None, ids_or_none)

        found, pullback = jax.vjp(of_floats, q, k, v, log_decay, initial)
        return *found, *pullback((dout, dfinal))

    return results


def _run(inputs, with_ids=True, with_initial=True, **sizes) -> oracle.Results:
    return oracle.Results(*_results(tuple(sizes.items()), with_ids, with_initial)(*inputs))


def _packed() -> contract.Inputs:
    """Documents, padding and shards of every kind; borders lie at multiples of 20."""
    rows = [
        # a document in six shards of eight, and in more than half the row
        [1] * 15 + [2] * 100 + [3] * 45,
        # a shard of padding within a document; then one that starts exactly at a border
        [1] * 40 + [0] * 20 + [1] * 20 + [2] * 80,
        # shards of padding first; padding over a border before a new document, and before the same
        [0] * 45 + [5] * 30 + [0] * 10 + [7] * 33 + [0] * 4 + [7] * 18 + [0] * 20,
        # an id that comes again: shards of one id each, and cut all the same
        [3] * 20 + [4] * 20 + [3] * 20 + [0] * 20 + [4] * 80,
        # nothing but padding
        [0] * 160,
        # many documents a shard, the last token a document
        [*np.arange(159) // 7 + 1] + [99],
    ]
    ids = np.asarray(rows, np.int32)
    return contract.make_inputs(_CASE._replace(batch=len(ids)), ids)


@functools.cache
def _packed_and_expected():
    inputs = _packed()
    return inputs, oracle.attention(*inputs)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_packed_rows_equal_the_recurrence(degree):
    inputs, expected = _packed_and_expected()
    found = _run(inputs, sequence=degree)
    contract.assert_close(found, expected)
    assert not np.asarray(found.out)[inputs.ids == 0].any()


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_one_document_equals_the_recurrence(degree):
    inputs = contract.make_inputs(_CASE)
    contract.assert_close(_run(inputs, with_ids=False, sequence=degree), oracle.attention(*inputs))


def test_without_an_initial_state_rows_begin_with_zeros():
    inputs, _ = _packed_and_expected()
    found = _run(inputs, with_initial=False, sequence=4)
    assert not np.asarray(found.dinitial).any()
    inputs = inputs._replace(initial=np.zeros_like(inputs.initial))
    expected = oracle.attention(*inputs)
    contract.assert_close(found._replace(dinitial=expected.dinitial), expected)


def test_batch_and_heads_may_be_split_as_well():
    inputs, expected = _packed_and_expected()
    contract.assert_close(_run(inputs, data=2, sequence=2, tensor=2), expected)


def test_what_padding_holds_is_never_seen():
    inputs, _ = _packed_and_expected()
    is_real = (inputs.ids != 0)[:, :, None, None]
    spoilt = {name: jnp.where(is_real, getattr(inputs, name), jnp.nan) for name in ("q", "k", "v")}
    found, clean = _run(inputs._replace(**spoilt), sequence=8), _run(inputs, sequence=8)
    for ours, theirs in zip(found, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_loses_no_more_than_its_output_rounding():
    inputs, _ = _packed_and_expected()
    narrow = {name: getattr(inputs, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "dout")}
    inputs = inputs._replace(**narrow)
    found, expected = _run(inputs, sequence=8), oracle.attention(*inputs)
    assert found.out.dtype == found.dq.dtype == jnp.bfloat16
    rounded = ("out", "dq", "dk", "dv")
    # As on one device: half a unit in the last of 8 bits; the rest stays float32.
    for name in rounded:
        ours, theirs = np.asarray(getattr(found, name), np.float64), getattr(expected, name)
        np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=1e-5 * np.abs(theirs).max())
    exact = {name: getattr(expected, name) for name in rounded}
    contract.assert_close(found._replace(**exact), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 2), min_size=16, max_size=16))
def test_any_documents_in_shards_of_two_tokens(ids):
    """Ids of a row, and the same from its middle on; every example runs the same program."""
    rows = np.asarray([ids, ids[8:] + ids[:8]], np.int32)
    inputs = contract.make_inputs(Case(batch=2, length=16, heads=3, key_dim=2, value_dim=3), rows)
    # Of few terms of either sign a sum may nearly cancel: here all are positive.
    positive = {name: abs(getattr(inputs, name)) for name in inputs._fields if name != "log_decay"}
    inputs = inputs._replace(**positive)
    contract.assert_close(_run(inputs, sequence=8), oracle.attention(*inputs))


def _collectives(function, *arguments):
    return collectives.of(jax.jit(function).lower(*arguments).compile())


def _gradients(attend, wanted):
    """A function that returns both outputs and the gradients of the arguments named by place."""

    def gradients(*arguments):
        floats = [arguments[at] for at in wanted]

        def of_wanted(*floats):
            given = dict(zip(wanted, floats, strict=True))
            return attend(*(given.get(at, x) for at, x in enumerate(arguments)))

        found, pullback = jax.vjp(of_wanted, *floats)
        # The outputs as their own gradients: no constants that make the backward pass vanish.
        return *found, *pullback(found)

    return gradients


# Of four shards: [B, H, K, V] each.
_STATES = collectives.Collective("all-gather", "f32[4,2,4,8,5]")


@pytest.mark.parametrize(("length", "with_ids"), [(160, True), (640, False)])
def test_shards_exchange_states_once_in_each_direction(length, with_ids):
    arguments = list(contract.make_inputs(_CASE._replace(length=length))[:6])
    if not with_ids:
        arguments[5] = None
    attend = _split(_mesh(sequence=4))
    assert _collectives(attend, *arguments) == [_STATES]
    assert _collectives(_gradients(attend, (0, 1, 2, 4)), *arguments) == [_STATES] * 2
    # If anybody asks for that of the decays, one number a head is summed.
    found = _collectives(_gradients(attend, (0, 1, 2, 3, 4)), *arguments)
    assert sorted(found) == [_STATES, _STATES, collectives.Collective("all-reduce", "f32[4]")]


def test_a_saved_state_is_not_gathered_again_when_a_layer_is_recomputed():
    arguments = contract.make_inputs(_CASE)[:6]
    attend = _split(_mesh(sequence=4))
    policy = jax.checkpoint_policies.save_only_these_names(remat.STATE)

    def layer(q, *others):
        # What follows the op makes its output a residual, so that it is computed again.
        out, final = attend(jnp.tanh(q), *others)
        return jnp.sin(out), final

    def count(layer):
        # Before XLA's CPU compiler, which does not honour the barriers of a recomputation.
        gradients = jax.jit(_gradients(layer, (0, 1, 2)))
        return gradients.lower(*arguments).as_text().count("stablehlo.all_gather")

    assert count(jax.checkpoint(layer, policy=policy)) == 2
    assert count(jax.checkpoint(layer)) == 3


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        (
            {"ids": P(None, "sequence")},
            {},
            r"segment_ids_BT must .* \[2, 160\].*whole rows",
        ),
        (
            {"initial": P(None, "sequence")},
            {},
            r"initial_state_BHKV must .* \[2, 4, 8, 5\]",
        ),
        ({"vary": P("sequence")}, {}, "the same on all shards of 'sequence'"),
        ({}, {"check_vma": False}, "check_vma=True"),
    ],
)
def test_what_must_not_be_split_is_refused(specs, options, message):
    arguments = contract.make_inputs(_CASE)[:6]
    mesh = _mesh(sequence=4)
    names = ("q", "k", "v", "log_decay", "initial", "ids")

    def attend(zeros, q, k, v, log_decay, initial, ids):
        ids = ids + zeros[0] if "vary" in specs else ids
        return lightning.lightning_attention(
            q, k, v, log_decay, axis="sequence", initial_state_BHKV=initial, segment_ids_BT=ids
        )

    in_specs = [(_SPLIT_BY_ROLE | specs)[name] for name in names]
    split = jax.shard_map(
        attend, mesh=mesh, in_specs=(P("sequence"), *in_specs), out_specs=(_TIME, P()), **options
    )
    with pytest.raises(ValueError, match=message):
        split(np.zeros(4, np.int32), *arguments)
