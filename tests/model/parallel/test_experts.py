"""Experts on many devices give what one device gives; capacity drops what the rule says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hybrid_jax.config import layers
from hybrid_jax.model.ffn import moe, router
from hybrid_jax.model.parallel import experts
from tests import aot

D, E, F, A, TOKENS = 8, 16, 6, 2, 64
SPEC = layers.SigmoidTopK(experts_per_token=A)
AXES = ("data", "expert", "tensor")
TOKEN_SPLIT = PartitionSpec(("data", "expert"))
# In the text of a program: one match an operation, whether it is split into start and done or not.
RAGGED = re.compile(r" ragged-all-to-all(-start)?\(")
GATHERS = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(")
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
def on_mesh(sizes, capacity=experts.DROPLESS, replicas=(), token_groups=1):
    """The jitted mixture: (x, router, gate_up, down, bias) -> out, and the load of each device."""
    tensor = "tensor" if sizes[2] > 1 else None
    axes = experts.ExpertAxes(tensor=tensor, replicas=replicas)

    def local(x, matrix, gate_up, down, bias):
        choice = router.choose_sigmoid(x @ matrix, bias, SPEC)
        out, load = experts.expert_mixture(
            x, choice, gate_up, down, E, axes, capacity, token_groups=token_groups
        )
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


@pytest.mark.parametrize("capacity", [experts.DROPLESS, experts.Capacity(per_expert=1.25)], ids=str)
def test_groups_of_tokens_change_nothing(capacity):
    arguments, cotangent = arrays()
    bias = bias_of(list(SKEWS)[2])
    whole, cut = (
        with_gradients(on_mesh((2, 4, 1), capacity, ("data",), groups))(arguments, bias, cotangent)
        for groups in (1, 4)
    )
    for left, right in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert left.dtype == right.dtype
        if left.dtype == jnp.int32:
            np.testing.assert_array_equal(left, right)
        else:
            assert_close(left, right)


def mixture(
    arguments, expert_TA, *, sizes=(2, 4, 1), num_experts=E, gate_up_split="expert", **options
):
    """The mixture for choices that are given, each of weight 1, and the load of each device."""

    def local(x, expert, gate_up, down):
        choice = router.Choice(expert, jnp.ones(expert.shape, jnp.float32))
        capacity, axes = experts.Capacity(per_expert=2.0), experts.ExpertAxes(replicas=("data",))
        out, load = experts.expert_mixture(
            x, choice, gate_up, down, num_experts, axes, capacity, **options
        )
        return out, jax.tree.map(lambda leaf: leaf[None], load)

    specs = (TOKEN_SPLIT, TOKEN_SPLIT, PartitionSpec(gate_up_split), PartitionSpec("expert"))
    mapped = jax.shard_map(
        local,
        mesh=jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3),
        in_specs=specs,
        out_specs=(TOKEN_SPLIT, TOKEN_SPLIT),
    )
    x, _, gate_up, down = arguments
    return jax.jit(mapped)(x, expert_TA, gate_up, down)


def test_padding_takes_no_place_from_tokens():
    arguments, _ = arrays()
    # Every second token is padding. The others want expert 3, which takes 16 = 2 x 64 x 2 / 16,
    # and expert 9.
    expert_TA = np.where(np.arange(TOKENS)[:, None] % 2, E, np.array([[3, 9]])).astype(np.int32)
    out, load = mixture(arguments, expert_TA)
    assert load.chosen_E.sum() == TOKENS
    np.testing.assert_array_equal(load.dropped_E.sum(0)[jnp.array([3, 9])], [16, 16])
    has_out_T = np.asarray(out != 0).any(axis=1)
    token_T = np.arange(TOKENS)
    np.testing.assert_array_equal(has_out_T, (token_T % 2 == 0) & (token_T < 32))


def test_bfloat16_rows_are_exchanged_as_they_are():
    (x, matrix, gate_up, down), _ = arrays()
    bias = bias_of("even")
    x = jnp.asarray(x, jnp.bfloat16)
    choice = choices_of(bias)

    def local(x, expert, weight, gate_up, down):
        return experts.expert_mixture(
            x, router.Choice(expert, weight), gate_up, down, E, experts.ExpertAxes()
        )[0]

    mapped = jax.shard_map(
        local,
        mesh=jax.make_mesh((8, 1), ("expert", "tensor"), (AxisType.Auto,) * 2),
        in_specs=PartitionSpec("expert"),
        out_specs=PartitionSpec("expert"),
    )
    out = jax.jit(mapped)(x, choice.expert_TA, choice.weight_TA, gate_up, down)
    assert out.dtype == jnp.float32
    expected = jax.jit(moe.expert_mixture, static_argnums=(4, 5))(x, choice, gate_up, down, E, None)
    # The same roundings, row by row.
    assert_close(out, expected)


def test_what_does_not_fit_is_said():
    arguments, _ = arrays()
    expert_TA = np.zeros((TOKENS, A), np.int32)
    with pytest.raises(ValueError, match="18 experts over the 4 devices"):
        mixture(arguments, expert_TA, num_experts=18)
    with pytest.raises(ValueError, match=r"gate_up of the 4 experts of a device.*got shape \(16,"):
        mixture(arguments, expert_TA, gate_up_split=None)
    with pytest.raises(ValueError, match="8 tokens of a device into 3 groups"):
        mixture(arguments, expert_TA, token_groups=3)
    with pytest.raises(ValueError, match=r"Capacity.per_expert .* got 0"):
        experts.Capacity(per_expert=0)


def program_of_a_step(
    target, sizes=(1024, 512, 768), capacity=experts.DROPLESS, groups=1, options=None
) -> list[str]:
    """The instructions of the mixture and its gradients, in their order; 4 experts a device."""
    devices = aot.devices(target)
    P = len(devices)
    mesh = jax.make_mesh((P,), ("expert",), (AxisType.Auto,), devices=devices)

    def local(x, expert, weight, gate_up, down, dout):
        def call(x, weight, gate_up, down):
            choice, axes = router.Choice(expert, weight), experts.ExpertAxes()
            return experts.expert_mixture(
                x, choice, gate_up, down, 4 * P, axes, capacity, token_groups=groups
            )[0]

        out, pull = jax.vjp(call, x, weight, gate_up, down)
        return out, pull(dout)

    split = PartitionSpec("expert")
    sharding = jax.sharding.NamedSharding(mesh, split)
    tokens, width, hidden = sizes
    shapes = [
        ((P * tokens, width), jnp.bfloat16),
        ((P * tokens, 2), jnp.int32),
        ((P * tokens, 2), jnp.float32),
        ((4 * P, width, 2, hidden), jnp.bfloat16),
        ((4 * P, hidden, width), jnp.bfloat16),
        ((P * tokens, width), jnp.float32),
    ]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)
    abstract = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    lowered = jax.jit(mapped).lower(*abstract)
    return lowered.compile(compiler_options=options).as_text().splitlines()


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5p:2x2x1", "h100:4"])
def test_a_step_for_chips_exchanges_four_times_and_gathers_only_counts(target):
    program = program_of_a_step(target)
    assert len([line for line in program if RAGGED.search(line)]) == 4
    others = [line for line in program if GATHERS.search(line)]
    # The counts of 16 experts at 4 devices; TPUs gather so few numbers by a sum.
    assert others and all(re.search(r"= \(?s32\[", line) for line in others), others


@pytest.mark.aot
def test_with_two_groups_a_tpu_multiplies_during_half_of_the_exchanges():
    option = {"xla_tpu_enable_async_ragged_all_to_all": "true"}
    # As a device of Text-01 would have it with 8 of them to a mixture: what is smaller, or has a
    # buffer for the worst case, is scheduled in other ways.
    sizes, capacity = (8192, 6144, 9216), experts.Capacity(per_device=2.0)
    waiting, hidden, exchanges = set(), set(), 0
    for line in program_of_a_step("v5p:2x2x2", sizes, capacity, 2, option):
        name = line.split(" = ")[0].strip().removeprefix("%")
        if " ragged-all-to-all-start(" in line:
            waiting.add(name)
            exchanges += 1
        elif " ragged-all-to-all-done(" in line:
            waiting -= {re.search(r"done\(%([^)]+)\)", line)[1]}
        elif "tpu_custom_call" in line and "metadata" not in name:
            hidden |= waiting
    assert exchanges == 8
    assert len(hidden) >= 4
