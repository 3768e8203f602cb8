"""Prefill and decode on eight devices equal those on one, whatever is split over them."""

import dataclasses
import functools

import numpy as np
import pytest
from flax import nnx

from hybrid_jax import inference
from hybrid_jax import model as models
from hybrid_jax.model import state as states
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.parallel import placement as placements
from sharding import rules
from tests.inference import answering
from tests.inference.answering import MODELS
from tests.model import configs


@functools.cache
def _model(name, placement=None):
    model = models.build(MODELS[name])
    if placement is None:
        return model
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, placement.place(params))


@functools.cache
def _answers(name, rows, placement=None):
    return answering.answers(_model(name, placement), rows, placement)


# Each takes ten seconds to compile: daily, every way to split rows, heads and experts once.
_DAILY = [
    ("text_01", "expert=2,tensor=4", 8),
    ("m2", "expert=8", 1),
    ("m2", "data=2,expert=2,tensor=2", 8),
]
_NIGHTLY = [("odd", "data=2,expert=4", rows) for rows in (1, 8)] + [
    (name, mesh, rows)
    for name in ("text_01", "m2")
    for mesh in (
        "tensor=8",
        "expert=8",
        "expert=2,tensor=4",
        "expert=4,tensor=2",
        "data=4,tensor=2",
        "data=8",
        "data=2,fsdp=2,tensor=2",
        "data=2,expert=2,tensor=2",
    )
    for rows in (1, 2, 4, 8)
    if (name, mesh, rows) not in _DAILY
]


def _check(name, rows, placement):
    answering.assert_close(_answers(name, rows), _answers(name, rows, placement))


@pytest.mark.parametrize(
    ("name", "mesh", "rows"),
    [*_DAILY, *(pytest.param(*case, marks=pytest.mark.nightly) for case in _NIGHTLY)],
)
def test_logits_and_state_are_those_of_one_device(name, mesh, rows):
    _check(name, rows, placements.make(mesh, "serve"))


@pytest.mark.parametrize(
    "mesh", ["expert=8", pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.nightly)]
)
def test_many_tokens_travel_to_their_experts_instead_of_being_gathered(mesh, monkeypatch):
    monkeypatch.setattr(placed, "GATHERED_TOKENS", 0)
    # A placement of its own: programs are kept by placement.
    serve = dataclasses.replace(rules.get("serve"))
    _check("text_01", 8, dataclasses.replace(placements.make(mesh, "serve"), rules=serve))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 20, "seed": 3},
        pytest.param({}, marks=pytest.mark.nightly, id="greedy"),
    ],
)
def test_generation_is_the_same_on_a_mesh(options):
    placement = placements.make("expert=2,tensor=4", "serve")
    prompts, lengths = configs.tokens(2, 13), [13, 6]
    one, many = (
        inference.generate(
            _model("text_01", where),
            prompts,
            prompt_lengths=lengths,
            max_new_tokens=5,
            placement=where,
            **options,
        )
        for where in (None, placement)
    )
    np.testing.assert_array_equal(one, many)


def test_every_device_holds_its_own_part_of_the_state():
    placement = placements.make("data=2,expert=2,tensor=2", "serve")
    state = states.abstract_state(MODELS["text_01"], 4, 16, placement)
    memory_LLBHKV, cache = state.entries
    assert memory_LLBHKV.sharding.shard_shape(memory_LLBHKV.shape) == (2, 2, 1, 4, 8, 8)
    assert cache.k_BSGK.sharding.shard_shape(cache.k_BSGK.shape) == (2, 1, 1, 16, 4, 8)
    # Three rows divide over neither axis: every device holds them all.
    whole = states.shardings(MODELS["text_01"], 3, 16, placement).lengths_B
    assert whole.shard_shape((3,)) == (3,)


@pytest.mark.parametrize(
    ("name", "mesh", "message"),
    [
        ("fsdp", "fsdp=8", "'fsdp' keep parameters in parts over fsdp=8.*use the rules 'serve'"),
        ("long_context", "tensor=4,sequence=2", "parameters in parts over sequence=2"),
    ],
)
def test_rules_that_gather_for_every_token_are_refused(name, mesh, message):
    with pytest.raises(ValueError, match=message):
        states.initial_state(MODELS["m2"], 1, 8, placements.make(mesh, name))


def test_more_devices_than_key_value_heads_are_refused():
    with pytest.raises(ValueError, match=r"state of SoftmaxAttention.*kv_heads of 2.*tensor=8"):
        states.initial_state(configs.m2(), 1, 8, placements.make("tensor=8", "serve"))
