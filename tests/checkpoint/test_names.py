"""Every rule is total and exact: each published value has one place in our tree, and a way back."""

import math

import numpy as np
import pytest

from hybrid_jax.checkpoint import hf_config, leaves
from hybrid_jax.checkpoint.names import minimax, tree
from hybrid_jax.checkpoint.names.rules import Rule, check_tiling
from hybrid_jax.config import layers, presets
from tests.checkpoint.published import D, E, F, G, H, K, m2_config, original_config, shapes

PUBLISHED = [
    name
    for name in presets.names()
    if not any(isinstance(layer.ffn, layers.DenseFfn) for layer in presets.get(name).layers)
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_names_tile_every_parameter(name):
    config = presets.get(name)
    check_tiling(minimax.rules(config), leaves.shapes(config))


@pytest.mark.parametrize("name", presets.names())
def test_our_own_names_tile_every_parameter(name):
    config = presets.get(name)
    shapes = leaves.shapes(config)
    check_tiling(tree.rules(config, shapes), shapes)


@pytest.mark.parametrize("count, name", [(8243, "minimax-m1-80k"), (48239, "minimax-m2")])
def test_the_releases_have_this_many_tensors(count, name):
    # 8243 by the index of M1; M2: 3 + 62 * (2 + 4 + 2 + 2 + 256 * 3), without FP8 scales.
    rules = minimax.rules(presets.get(name))
    assert len(rules) == count
    parameters = {"minimax-m1-80k": 456_089_655_296, "minimax-m2": 228_689_764_864}
    assert sum(math.prod(rule.shape) for rule in rules) == parameters[name]


@pytest.mark.parametrize(
    "values", [original_config(), original_config(shared_intermediate_size=5), m2_config()]
)
def test_names_and_shapes_are_those_of_the_release(values):
    config = hf_config.describe(values, "config.json").model
    assert {rule.name: rule.shape for rule in minimax.rules(config)} == shapes(values)


def _one(values: dict, suffix: str, stored=()) -> Rule:
    config = hf_config.describe(values, "config.json").model
    return next(rule for rule in minimax.rules(config, stored) if rule.name.endswith(suffix))


# Ours at the given place is the published value in this row and column (or flat place).
ELEMENTS = [
    ("qkv_proj.weight", (3, 2, 1, 5), (2 * 3 * K + 1 * K + 5, 3)),
    ("output_gate.weight", (3, 2, 5), (2 * K + 5, 3)),
    ("self_attn.norm.weight", (2, 5), (2 * K + 5,)),
    ("out_proj.weight", (2, 5, 3), (3, 2 * K + 5)),
    ("q_proj.weight", (3, 2, 5), (2 * K + 5, 3)),
    ("k_proj.weight", (3, 1, 5), (1 * K + 5, 3)),
    ("o_proj.weight", (2, 5, 3), (3, 2 * K + 5)),
    ("block_sparse_moe.gate.weight", (3, 1), (1, 3)),
    ("experts.1.w1.weight", (3, 7), (7, 3)),
    ("experts.1.w3.weight", (3, 7), (7, 3)),
    ("experts.1.w2.weight", (7, 3), (3, 7)),
    ("lm_head.weight", (3, 9), (9, 3)),
    ("embed_tokens.weight", (9, 3), (9, 3)),
]


@pytest.mark.parametrize("suffix, ours, published", ELEMENTS)
def test_kernels_are_turned_and_split_by_the_formula(suffix, ours, published):
    rule = _one(original_config(), suffix)
    array = np.arange(math.prod(rule.shape)).reshape(rule.shape)
    block = rule.to_block(array)
    assert block.shape == rule.block_shape and block[ours] == array[published]
    assert np.array_equal(rule.from_block(block), array)


def test_gate_and_up_projection_lie_side_by_side():
    values = original_config()
    assert _one(values, "experts.1.w1.weight").index == (0, 0, 1, None, 0)
    assert _one(values, "experts.1.w3.weight").index == (0, 0, 1, None, 1)


def test_fused_experts_hold_the_same_values_as_single_ones():
    values = original_config()
    name = "model.layers.0.mlp"
    stored = {f"{name}.gate.weight", f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"}
    fused = _one(values, "experts.gate_up_proj", stored)
    assert fused.shape == (E, 2 * F, D)
    array = np.arange(E * 2 * F * D).reshape(fused.shape)
    up = _one(values, "layers.0.block_sparse_moe.experts.2.w3.weight")
    assert fused.covers(up) and not up.covers(fused)
    # transformers: w1 in the first F rows, w3 in the other.
    assert np.array_equal(up.from_block(fused.cut(fused.to_block(array), up)), array[2, F:])
    down = _one(values, "experts.down_proj", stored)
    array = np.arange(E * D * F).reshape(down.shape)
    w2 = _one(values, "layers.0.block_sparse_moe.experts.2.w2.weight")
    assert np.array_equal(w2.from_block(down.cut(down.to_block(array), w2)), array[2])


def test_layers_go_to_their_run_and_repeat():
    config = presets.get("minimax-text-01")
    places = {rule.name: (rule.leaf, rule.index) for rule in minimax.rules(config)}
    assert places["model.layers.17.self_attn.qkv_proj.weight"] == ("stack.runs.0.mixer.qkv", (2, 1))
    assert places["model.layers.79.self_attn.k_proj.weight"] == ("stack.runs.1.mixer.k", (9, 0))


def test_a_vocabulary_with_a_gap_an_overlap_or_a_stranger_is_found():
    whole = {"a": (2, 3)}
    row = Rule("r0", (3,), "a", (0,))
    check_tiling([row, Rule("r1", (3,), "a", (1,))], whole)
    for rules, message in (
        ([row], "fill 3 of 6"),
        ([row, row], "'r0' twice"),
        ([row, Rule("r1", (3,), "b", (1,))], "'b', which the model does not have"),
        ([row, Rule("r1", (4,), "a", (1,))], "gives a block"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tiling(rules, whole)


def test_derived_tensors_are_listed_and_weights_are_not():
    derived = [
        *(f"model.layers.3.self_attn.{n}" for n in ("slope_rate", "query_decay", "key_decay")),
        "model.layers.3.self_attn.diagonal_decay",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    ]
    assert all(minimax.is_derived(n, 62, may_have_extra_layers=False) for n in derived)
    extra = "model.layers.62.self_attn.q_proj.weight"
    assert minimax.is_derived(extra, 62, may_have_extra_layers=True)
    assert not minimax.is_derived(extra, 62, may_have_extra_layers=False)
    assert not minimax.is_derived(extra, 63, may_have_extra_layers=True)
    assert not minimax.is_derived(
        "model.layers.3.self_attn.q_proj.weight", 62, may_have_extra_layers=True
    )


def test_heads_and_groups_are_told_apart():
    assert (H, G) == (4, 2)
    rule = _one(m2_config(), "k_norm.weight")
    assert rule.block_shape == (G, K) and _one(m2_config(), "q_norm.weight").block_shape == (H, K)
