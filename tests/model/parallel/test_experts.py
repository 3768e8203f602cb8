"""Experts on many devices give what one device gives; capacity drops what the rule says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hybrid_jax.config import layers
from hybrid_jax.model.ffn import moe, router
from hybrid_jax.model.parallel import experts

D, E, F, A, TOKENS = 8, 16, 6, 2, 64
SPEC = layers.SigmoidTopK(experts_per_token=A)
AXES = ("data", "expert", "tensor")
TOKEN_SPLIT = PartitionSpec(("data", "expert"))
# Sizes of the mesh axes.
MESHES = [(4, 2, 1), (2, 4, 1), (1, 8, 1), (1, 4, 2)]
# What is added to the scores of experts when they are chosen.
SKEWS = {
    "even": {},
    "all tokens choose the experts of one device": {4: 9.0, 5: 9.0},
    "all tokens choose one expert, and some experts get none": {7: 9.0, 2: -9.0, 3: -9.0},
}


def bias_of(skew):
    bias = np.zeros(E, np.float32)
    for expert, value in SKEWS[skew].items():
        bias[expert] = value
    return bias


@functools.cache
def arrays():
    """x, router, gate_up and down, and a cotangent."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return (draw(TOKENS, D), draw(D, E), draw(E, D, 2, F), draw(E, F, D)), draw(TOKENS, D)


def on_one_device(x, matrix, gate_up, down, bias):
    choice = router.choose_sigmoid(x @ matrix, bias, SPEC)
    return moe.expert_mixture(x, choice, gate_up, down, E, None)


@functools.cache
def on_mesh(sizes, capacity=experts.DROPLESS, replicas=()):
    """The jitted mixture: (x, router, gate_up, down, bias) -> out, and the load of each device."""
    tensor = "tensor" if sizes[2] > 1 else None
    axes = experts.ExpertAxes(tensor=tensor, replicas=replicas)

    def local(x, matrix, gate_up, down, bias):
        choice = router.choose_sigmoid(x @ matrix, bias, SPEC)
        out, load = experts.expert_mixture(x, choice, gate_up, down, E, axes, capacity)
        return out, jax.tree.map(lambda leaf: leaf[None], load)

    specs = (
        TOKEN_SPLIT,
        PartitionSpec(),
        PartitionSpec("expert", None, None, tensor),
        PartitionSpec("expert", tensor),
        PartitionSpec(),
    )
    mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(TOKEN_SPLIT, TOKEN_SPLIT))
    return jax.jit(mapped)


@functools.cache
def with_gradients(function):
    """Jitted: (arguments, bias, cotangent) -> out, extras, gradients of the arguments."""

    @jax.jit
    def run(arguments, bias, cotangent):
        def call(*arguments):
            found = function(*arguments, bias)
            return found if isinstance(found, tuple) else (found, None)

        out, pull, extras = jax.vjp(call, *arguments, has_aux=True)
        return out, extras, pull(cotangent)

    return run


def assert_close(found, expected):
    """float32: relative to the largest entry, over sums of at most 64 tokens of 2 experts."""
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_dropless_is_the_mixture_of_one_device_with_all_gradients(sizes, skew):
    arguments, cotangent = arrays()
    bias = bias_of(skew)
    expected, _, gradients = with_gradients(on_one_device)(arguments, bias, cotangent)
    found, load, ours = with_gradients(on_mesh(sizes))(arguments, bias, cotangent)
    assert_close(found, expected)
    for left, right in zip(ours, gradients, strict=True):
        assert_close(left, right)
    assert not load.dropped_E.any()
    assert load.chosen_E.sum() == TOKENS * A
    if skew != "even":
        assert load.arrived.max() >= load.arrived.sum() // 2 // sizes[0]


def choices_of(bias):
    (x, matrix, _, _), _ = arrays()
    return router.choose_sigmoid(jnp.asarray(x) @ matrix, jnp.asarray(bias), SPEC)


def oracle(bias, kept_TA):
    """The mixture over the choices that are kept, each by itself, in float64."""
    (x, _, gate_up, down), _ = arrays()
    choice = choices_of(bias)
    out = np.zeros((TOKENS, D))
    for token, a in np.argwhere(kept_TA):
        expert = int(choice.expert_TA[token, a])
        gate, up = np.einsum("d,dcf->cf", x[token].astype(np.float64), gate_up[expert])
        hidden = gate / (1 + np.exp(-gate)) * up
        out[token] += float(choice.weight_TA[token, a]) * (hidden @ down[expert])
    return out


def kept_by_the_global_rule(expert_TA, limit):
    """Tokens in order; a choice is kept while its expert has taken fewer than the limit."""
    taken, kept = np.zeros(E, int), np.zeros(expert_TA.shape, bool)
    for token, a in np.ndindex(expert_TA.shape):
        kept[token, a] = taken[expert_TA[token, a]] < limit
        taken[expert_TA[token, a]] += 1
    return kept


@pytest.mark.parametrize("skew", ["even", list(SKEWS)[2]])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1)], ids=str)
def test_capacity_is_that_of_all_tokens_and_earlier_ones_are_kept(sizes, skew):
    factor = 1.25
    capacity = experts.Capacity(per_expert=factor)
    arguments, _ = arrays()
    bias = bias_of(skew)
    out, load = on_mesh(sizes, capacity, ("data",))(*arguments, bias)
    expert_TA = np.asarray(choices_of(bias).expert_TA)
    kept = kept_by_the_global_rule(expert_TA, math.ceil(factor * TOKENS * A / E))
    assert 0 < kept.sum() < kept.size
    assert_close(out, oracle(bias, kept))
    chosen = np.bincount(expert_TA.ravel(), minlength=E)
    dropped = np.bincount(expert_TA[~kept], minlength=E)
    np.testing.assert_array_equal(load.chosen_E.sum(0), chosen)
    np.testing.assert_array_equal(load.dropped_E.sum(0), dropped)
    assert load.arrived.sum() == kept.sum()


def test_a_shared_capacity_drops_less_than_one_for_each_group():
    arguments, _ = arrays()
    capacity = experts.Capacity(per_expert=1.25)
    shared, apart = (
        int(on_mesh((4, 2, 1), capacity, replicas)(*arguments, bias_of("even"))[1].dropped_E.sum())
        for replicas in (("data",), ())
    )
    assert 0 < shared < apart


def test_a_full_device_takes_the_rows_of_earlier_devices_and_lower_experts():
    sizes, skew = (1, 8, 1), list(SKEWS)[1]
    arguments, _ = arrays()
    bias = bias_of(skew)
    out, load = on_mesh(sizes, experts.Capacity(per_device=2.5))(*arguments, bias)
    # All 128 rows are for experts 4 and 5, of one device that takes 40 = 2.5 x 16: all 16 of
    # devices 0 and 1, and of device 2 the 8 of expert 4.
    expert_TA = np.asarray(choices_of(bias).expert_TA)
    token_T1 = np.arange(TOKENS)[:, None]
    kept = (token_T1 < 16) | ((token_T1 < 24) & (expert_TA == 4))
    assert_close(out, oracle(bias, kept))
    np.testing.assert_array_equal(load.arrived, [0, 0, 40, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(load.dropped_E[:, 4:6].T, [[0] * 3 + [8] * 5, [0] * 2 + [8] * 6])


@pytest.mark.parametrize("skew", SKEWS)
def test_capacity_for_the_worst_case_is_dropless_with_its_gradients(skew):
    arguments, cotangent = arrays()
    bias = bias_of(skew)
    capacity = experts.Capacity(per_expert=E / A, per_device=8.0)
    limited, free = (
        with_gradients(on_mesh((1, 8, 1), which))(arguments, bias, cotangent)
        for which in (capacity, experts.DROPLESS)
    )
    for left, right in zip(jax.tree.leaves(limited), jax.tree.leaves(free), strict=True):
        np.testing.assert_array_equal(left, right)
