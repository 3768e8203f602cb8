"""Prefill and decode on eight devices equal those on one, whatever is split over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import inference
from hybrid_jax import model as models
from hybrid_jax.model import state as states
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.parallel import placement as placements
from sharding import rules
from tests.model import configs

CAPACITY, CHUNK = 24, 8


def _sized(config):
    """The model with dims that divide by eight, and weights that do not amplify rounding."""

    def wide(run):
        mixer = dataclasses.replace(run.layer.mixer, num_heads=8)
        if hasattr(mixer, "num_kv_heads"):
            mixer = dataclasses.replace(mixer, num_kv_heads=8)
        ffn = dataclasses.replace(run.layer.ffn, num_experts=8, hidden_dim=16)
        return dataclasses.replace(run, layer=dataclasses.replace(run.layer, mixer=mixer, ffn=ffn))

    pattern = tuple(map(wide, config.pattern))
    return dataclasses.replace(config, pattern=pattern, hidden_dim=32, initializer_range=0.1)


MODELS = {
    "text_01": _sized(configs.text_01()),
    "m2": _sized(configs.m2()),
    # Dense and shared feed-forwards, tied and shifted embeddings; three heads, four experts.
    "odd": dataclasses.replace(configs.odd(), initializer_range=0.1),
}


@functools.cache
def _model(name, placement=None):
    model = models.build(MODELS[name])
    if placement is None:
        return model
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, placement.place(params))


# Both chunks of a prompt are one program: each has a row that ends in it.
LENGTHS = (13, 6, 9, 1, 12, 8, 3, 10)


@functools.cache
def _answers(name, rows, placement=None):
    """Logits after ragged prompts in chunks, then after each of two more tokens; the last state."""
    model, width = _model(name, placement), 2 * CHUNK
    lengths = np.array(LENGTHS)[:rows] if rows > 1 else np.array([width])
    tokens = configs.tokens(len(LENGTHS), width + 2)[:rows]
    state = model.initial_state(rows, CAPACITY, placement)
    logits, state = inference.prefill(model, tokens[:, :width], lengths, state, CHUNK, placement)
    answers = [logits]
    step = jax.jit(
        lambda params, token_B, state: inference.decode_step(
            nnx.merge(nnx.split(model)[0], params), token_B, state, placement
        )
    )
    for ahead in range(2):
        token = tokens[np.arange(rows), lengths + ahead]
        logits, state = step(nnx.split(model)[1], jnp.asarray(token), state)
        answers.append(logits)
    return jax.device_get((answers, _without_padding(state)))


def _without_padding(state):
    """Caches with zeros past each row's length: what padding left there nobody ever sees."""
    real_BS = jnp.arange(CAPACITY)[None] < state.lengths_B[:, None]

    def one(leaf):
        is_cache = leaf.ndim > 1 and leaf.shape[2:4] == real_BS.shape
        return jnp.where(real_BS[None, None, :, :, None, None], leaf, 0) if is_cache else leaf

    return jax.tree.map(one, state)


# Each takes ten seconds to compile: daily, every way to split rows, heads and experts once.
_DAILY = [
    ("text_01", "tensor=8", 1),
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
    expected, found = _answers(name, rows), _answers(name, rows, placement)
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, one), many in pairs:
        # Sums in another order: relative to the largest of an array.
        limit = 1e-5 * np.abs(one).max()
        assert np.abs(many - one).max() <= limit, jax.tree_util.keystr(path)


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
