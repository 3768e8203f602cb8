"""What does not learn keeps every bit and costs no moments; a low-rank correction begins as nothing
and ends as a merged weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.config import training as t
from hybrid_jax.model import lowrank
from hybrid_jax.model.linear import project
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from tests.training import small

LORA = t.LoRA(rank=2, alpha=6.0)


def model(layer: int):
    """One layer: 0 is lightning attention with experts, 1 softmax with a dense feed-forward."""
    if layer == 1:
        return small.dense_model()
    config = small.small_model(num_kv_heads=2)
    return dataclasses.replace(config, pattern=config.pattern[:1])


@functools.cache
def updated(tuning, layer: int = 0, mesh: str = ""):
    """(skeleton, state before, state after two updates, metrics of the second)."""
    placement = placements.make(mesh, "expert") if mesh else None
    config = small.small_run(
        model=model(layer),
        tuning=tuning,
        batch_size=8,
        # So large that an update is a smooth function of the gradient, as in test_sharded.
        optimizer=t.AdamW(eps=1e-2),
        schedule=t.Schedule(peak=1e-1, warmup_steps=0),
    )
    skeleton = Skeleton(config.model, config.tuning)
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer, placement)
    before = jax.device_get(state)
    step = make_train_step(config, skeleton, optimizer, placement)
    batch = small.random_batch(8, 32)
    if placement is not None:
        batch = jax.device_put(batch, placement.sharding(*placements.ROWS))
    for _ in range(2):
        state, metrics = step(state, batch)
    return skeleton, before, jax.device_get(state), jax.device_get(metrics)


def changed(before, after) -> set[str]:
    return {
        name
        for name, array in before.params.items()
        if not np.array_equal(array, after.params[name])
    }


def kept_by_name(state) -> set[str]:
    """Parameters that the optimiser holds something for."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)]
    return {path[-1].key for path in paths if isinstance(path[-1], jax.tree_util.DictKey)}


def test_frozen_parameters_keep_every_bit_and_have_no_moments():
    skeleton, before, after, _ = updated(t.Frozen(train=("*.ffn.*", "norm.scale")), 1)
    learns = {name for name in skeleton.names if ".ffn." in name} | {"norm.scale"}
    assert changed(before, after) == learns == kept_by_name(after)


def test_globs_choose_by_name_and_say_what_there_is():
    axes = Skeleton(small.dense_model()).axes

    def trained(tuning):
        return Optimizer(small.small_run(tuning=tuning), axes).trained

    assert trained(t.Frozen(freeze=("stack.*",))) == {
        "embedding.table",
        "head.kernel",
        "norm.scale",
    }
    assert trained(t.Full()) == set(axes)
    with pytest.raises(
        ValueError, match=r"Frozen.train: 'norm.scales' matches none.*'norm.scale'.*"
    ):
        trained(t.Frozen(train=("norm.scales",)))
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        trained(t.Frozen(freeze=("*",)))
    with pytest.raises(ValueError, match=r"train or in freeze, and not in both"):
        t.Frozen(train=("*",), freeze=("*",))
    with pytest.raises(ValueError, match="Frozen freezes nothing"):
        trained(t.Frozen())
    # A norm and the router are there, but may have no correction.
    with pytest.raises(ValueError, match=r"LoRA.targets: '\*norm\*' matches none"):
        Skeleton(model(0), t.LoRA(targets=("*norm*",)))
    with pytest.raises(ValueError, match="matches none"):
        Skeleton(model(0), t.LoRA(targets=("*.router",)))


@pytest.mark.parametrize("layer", [0, 1])
def test_low_rank_corrections_begin_as_nothing_and_alone_learn(layer):
    skeleton, before, after, _ = updated(LORA, layer)
    thin = set(skeleton.abstract) - set(skeleton.names)
    matrices = {name for name in skeleton.names if ".mixer." in name or ".ffn." in name}
    matrices -= {name for name in matrices if name.endswith((".norm", ".router"))}
    assert thin == {name + end for name in matrices for end in (lowrank.A, lowrank.B)}
    assert changed(before, after) == thin == kept_by_name(after)
    # Two leading dims of stacked layers, experts' own, and parts of a fused projection share one A.
    shapes = {name: array.shape for name, array in after.params.items()}
    experts = () if layer else (4,)
    assert shapes["stack.runs.0.ffn.gate_up.lora_a"] == (1, 1, *experts, 32, 2)
    assert shapes["stack.runs.0.ffn.gate_up.lora_b"] == (1, 1, *experts, 2, 2, 32)
    assert shapes["stack.runs.0.mixer.out.lora_a"] == (1, 1, 2, 16, 2)

    rows = small.random_batch(2, 32)

    @jax.jit
    def hidden(params, base):
        inputs = rows.tokens_BT, rows.segment_ids_BT
        with_thin = skeleton.model(params).hidden(*inputs).x_BTD
        merged = skeleton.merged(params).hidden(*inputs).x_BTD
        return with_thin, merged, Skeleton(skeleton.config).model(base).hidden(*inputs).x_BTD

    @jax.jit
    def hidden_and_decoded(params):
        model = skeleton.model(params)
        state = model.initial_state(2, 32)
        decoded = model.hidden(rows.tokens_BT, state=state).x_BTD
        return model.hidden(rows.tokens_BT).x_BTD, decoded

    # Two ways through attention, of float32.
    np.testing.assert_allclose(*hidden_and_decoded(after.params), rtol=1e-4, atol=1e-5)
    base = {name: before.params[name] for name in skeleton.names}
    with_thin, _, plain = hidden(before.params, base)
    np.testing.assert_array_equal(with_thin, plain)
    with_thin, merged, plain = hidden(after.params, base)
    # Sums of 32 to 64 float32 products in another order, through one layer; far from the base.
    np.testing.assert_allclose(with_thin, merged, rtol=1e-4, atol=1e-5)
    assert np.abs(with_thin - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("layer", "mesh"),
    [
        (1, "fsdp=4,tensor=2"),
        pytest.param(0, "fsdp=2,expert=2,tensor=2", marks=pytest.mark.nightly),
    ],
)
def test_low_rank_corrections_learn_the_same_on_a_mesh(layer, mesh):
    _, _, alone, metrics = updated(LORA, layer)
    _, before, split, split_metrics = updated(LORA, layer, mesh)
    assert changed(before, split) == kept_by_name(split)
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-5)
    for name, array in alone.params.items():
        # float32 sums in another order, twice, and a rate of 0.1: relative to the largest.
        scale = max(np.abs(array).max(), 1e-12)
        assert np.abs(split.params[name] - array).max() <= 1e-4 * scale, name


def test_merging_adds_in_float32_and_rounds_once():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 2, 4, 5, 6)).astype(jnp.bfloat16)
    a, b = rng.normal(size=(3, 2, 4, 7)), rng.normal(size=(3, 2, 7, 5, 6))
    wide = weight.astype(np.float64) + 0.5 * np.einsum("xyir,xyrjk->xyijk", a, b)
    narrow = a.astype(np.float32), b.astype(np.float32)
    for arrays in ((weight, *narrow), (jnp.asarray(weight), *map(jnp.asarray, narrow))):
        found = np.asarray(lowrank.merged(*arrays, 0.5))
        assert found.dtype == jnp.bfloat16
        # Half of the last of 8 bits.
        np.testing.assert_allclose(found.astype(np.float64), wide, rtol=2**-8, atol=1e-6)


def test_a_small_correction_survives_weights_in_half_precision():
    signs = jnp.array([[1.0, -1.0] * 4])
    weight = lowrank.LowRank(
        jnp.ones((8, 4), jnp.bfloat16), signs.T, jnp.full((1, 4), 1e-4), 1.0
    ).astype(jnp.bfloat16)
    # One and 1e-4 are one in eight bits.
    assert (weight.merged() == weight.weight).all()
    found = project(signs.astype(jnp.bfloat16), weight)
    np.testing.assert_allclose(np.asarray(found, np.float32), 8e-4, rtol=2**-7)
