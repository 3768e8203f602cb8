"""One update on eight devices equals the one on a single device, whatever is split over them."""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from hybrid_jax.config import layers
from hybrid_jax.config import training as t
from hybrid_jax.config.model import REMAT_POLICIES
from hybrid_jax.config.presets import own
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from sharding import Logical
from sharding import rules as rules_lib
from tests.model.parallel import collectives
from tests.training import small

# No parameter has a dim of LENGTH.
ROWS, LENGTH = 8, 48
_SIZES = {"vocab_size": small.VOCAB, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2}
_SIZES |= {"head_dim": 8, "rotary_dim": 8, "num_layers": 2}


def _text_01():
    moe = layers.MoeFfn(
        num_experts=8, hidden_dim=16, router=layers.SoftmaxTopK(experts_per_token=2)
    )
    return own.hybrid("text-01-like", ffn=moe, period=2, **_SIZES)


def _m2():
    """Softmax attention everywhere, with norms of q and k, and a sigmoid router with a bias."""
    moe = layers.MoeFfn(
        num_experts=8, hidden_dim=16, router=layers.SigmoidTopK(experts_per_token=2)
    )
    config = own.hybrid("m2-like", ffn=moe, period=2, **_SIZES)
    run = dataclasses.replace(config.pattern[1], count=2)
    mixer = dataclasses.replace(run.layer.mixer, qk_norm=True, rotary_dim=4)
    layer = dataclasses.replace(run.layer, mixer=mixer)
    return dataclasses.replace(config, pattern=(dataclasses.replace(run, layer=layer),))


MODELS = {"text-01": _text_01, "m2": _m2}


def _batch(kind: str):
    """Documents and padding, or every row one document that no ids tell of."""
    batch = small.random_batch(ROWS, LENGTH)
    if kind == "packed":
        return batch
    time = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), batch.tokens_BT.shape)
    ones = np.ones_like(batch.weights_BT)
    return batch._replace(segment_ids_BT=None, positions_BT=time, weights_BT=ones)


class Update(NamedTuple):
    """What one update gave, on the host, and what its program exchanges."""

    state: Any
    metrics: dict
    exchanged: list[collectives.Collective]


@functools.cache
def _update(model: str, kind: str, rules: str = "", mesh: str = "", remat: str = "none") -> Update:
    """On one device where there are no rules."""
    placement = placements.make(mesh, rules) if rules else None
    config = small.small_run(
        model=dataclasses.replace(MODELS[model](), remat=remat),
        batch_size=ROWS,
        # With the usual 1e-8 a first update is the sign of the gradient; one that is all rounding
        # has none to agree on. So large, the update is a smooth function of the gradient.
        optimizer=t.AdamW(eps=1e-2),
        schedule=t.Schedule(peak=1e-2, warmup_steps=0),
    )
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    state = initial_state(config, skeleton, optimizer, placement)
    step = make_train_step(config, skeleton, optimizer, placement)
    batch = _batch(kind)
    if placement is not None:
        batch = jax.device_put(batch, placement.sharding(*placements.ROWS))
    program = step.lower(state, batch).compile()
    state, metrics = jax.device_get(program(state, batch))
    return Update(state, metrics, collectives.of(program))


# Each takes ten seconds and more to compile: daily, every way to split something, once.
_DAILY = [
    ("text-01", "packed", "fsdp", "fsdp=8", "none"),
    ("text-01", "packed", "expert", "data=2,expert=2,tensor=2", "none"),
    ("text-01", "packed", "long_context", "expert=2,sequence=4", "save_collectives"),
    ("m2", "unpacked", "long_context", "fsdp=2,sequence=2,tensor=2", "full"),
]
_OF_RULES = {
    "fsdp": "data=2,fsdp=4",
    "fsdp_tensor": "data=2,fsdp=2,tensor=2",
    "expert": "fsdp=2,expert=2,tensor=2",
    "long_context": "fsdp=2,expert=2,sequence=2",
    "long_rows": "fsdp=2,expert=2,sequence=2",
    "serve": "expert=4,tensor=2",
}
_COMBINED = [
    "sequence=8",
    "expert=8",
    "expert=4,sequence=2",
    "fsdp=2,sequence=4",
    "sequence=4,tensor=2",
    "expert=2,sequence=2,tensor=2",
    "fsdp=2,expert=2,tensor=2",
    "fsdp=2,sequence=2,tensor=2",
]
_NIGHTLY = [
    *(
        (model, kind, rules, mesh, "none")
        for model in MODELS
        for kind in ("packed", "unpacked")
        for rules, mesh in _OF_RULES.items()
    ),
    *((model, "packed", "long_context", mesh, "none") for model in MODELS for mesh in _COMBINED),
    *(
        ("text-01", "unpacked", "long_context", "expert=2,sequence=2,tensor=2", remat)
        for remat in REMAT_POLICIES
    ),
]


@pytest.mark.parametrize(
    ("model", "kind", "rules", "mesh", "remat"),
    [*_DAILY, *(pytest.param(*case, marks=pytest.mark.nightly) for case in _NIGHTLY)],
)
def test_an_update_is_the_same_wherever_it_is_computed(model, kind, rules, mesh, remat):
    state, metrics, _ = _update(model, kind, rules, mesh, remat)
    expected, expected_metrics, _ = _update(model, kind)
    assert set(metrics) - set(expected_metrics) == {"expert_dropped_fraction", "expert_rows_max"}
    assert metrics["expert_dropped_fraction"] == 0
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # float32 sums in another order, relative to the largest of an array. After one update AdamW's
    # first moment is the gradient, but for a factor.
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state), strict=True)
    for (path, value), found in pairs:
        scale = max(float(np.abs(value).max()), 1e-12)
        assert np.abs(found - value).max() <= 1e-5 * scale, jax.tree_util.keystr(path)


def test_every_preset_of_rules_is_compared():
    assert set(_OF_RULES) == set(rules_lib.PRESETS)


def _gathered(model: str, kind: str, rules: str, mesh: str, remat: str) -> Counter:
    """What an update gathers, by what it is: anything but these is named by its type."""
    place = placements.make(mesh, rules)
    sizes = place.shape.sizes
    skeleton = Skeleton(dataclasses.replace(MODELS[model]()))
    # As a layer uses them, and on the way there, with D still in parts; without dims of 1.
    parameters = set()
    for name, axes in skeleton.axes.items():
        shape = skeleton.abstract[name].shape[-len(axes) :]
        used = _split(place.rules.used_parameter(axes, shape, place.shape, name), axes, sizes)
        stored = _split(place.rules.parameter(axes, shape, place.shape, name), axes, sizes)
        # Words are used where they rest.
        used = [s if axis is Logical.VOCAB else u for axis, s, u in zip(axes, stored, used)]
        half = [s if axis is Logical.MODEL else u for axis, s, u in zip(axes, stored, used)]
        for parts in (used, half):
            local = [n // p for n, p in zip(shape, parts, strict=True)]
            if axes[-2:] == (Logical.PARTS, Logical.FFN) and Logical.EXPERTS in axes:
                # Gate and up of experts are side by side before they are whole.
                local[-2:] = [local[-2] * local[-1]]
            parameters.add(tuple(size for size in local if size > 1))
    heads = _SIZES["num_heads"] // sizes["tensor"]
    rows = ROWS // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    states = (sizes["sequence"], rows, heads, _SIZES["head_dim"], _SIZES["head_dim"])
    # Tokens of the devices that split words, each with its part of the rows' length.
    meeting = (rows * sizes["expert"], LENGTH // sizes["sequence"])

    def what(one: collectives.Collective) -> str:
        dtype, _, dims = one.result.rstrip("]").partition("[")
        shape = tuple(int(size) for size in dims.split(",") if int(size) > 1)
        if dtype == "s32" or shape == meeting:
            return "numbers"
        if shape == (*meeting, _SIZES["hidden_dim"]):
            return "tokens for words"
        if shape in parameters:
            return "parameter"
        if shape == states:
            return "states"
        if len(shape) == 2 and shape[1] == _SIZES["hidden_dim"]:
            return "rows of experts"
        return one.result

    exchanged = _update(model, kind, rules, mesh, remat).exchanged
    return Counter(what(one) for one in exchanged if one.kind == "all-gather")


def _split(spec, axes, sizes) -> list[int]:
    """Into how many parts each dim is split."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    parts += [()] * (len(axes) - len(parts))
    return [math.prod(sizes[axis] for axis in part) for part in parts]


def test_split_rows_gather_states_and_rows_of_experts_and_no_activation():
    found = _gathered(*_DAILY[2])
    del found["numbers"], found["parameter"]
    # One lightning layer, forward and backward. Two layers of experts, each there and back, both
    # ways: a CPU gathers where chips exchange. Tokens go to the words of the head, and gradients to
    # those of the embedding.
    assert found == {"states": 2, "rows of experts": 8, "tokens for words": 2}


def test_whole_parameters_are_gathered_and_gradients_of_the_largest_scattered():
    assert set(_gathered(*_DAILY[0])) == {"parameter", "numbers"}
    exchanged = _update(*_DAILY[0]).exchanged
    scattered = Counter(one.result for one in exchanged if one.kind == "reduce-scatter")
    # An eighth of their rows: experts of two layers, the embedding and the head. CPUs sum the
    # gradients of the others whole.
    assert scattered == {
        "f32[8,4,32]": 2,
        "f32[8,2,32]": 2,
        f"f32[{small.VOCAB},4]": 1,
        f"f32[4,{small.VOCAB}]": 1,
    }
    assert not [one for one in exchanged if one.kind == "collective-permute"]


@pytest.mark.parametrize("case", _DAILY[1:], ids=" ".join)
def test_no_logits_are_exchanged(case):
    words = {small.VOCAB, small.VOCAB // 2, small.VOCAB // 4}
    shapes = [
        [int(size) for size in one.result.rstrip("]").split("[")[1].split(",") if size]
        for one in _update(*case).exchanged
    ]
    # Of all that has a dim of words, only the embedding and the head: with a part of D.
    with_words = [shape for shape in shapes if words & set(shape)]
    assert with_words
    assert all(len(shape) == 2 and min(shape) <= 32 for shape in with_words)
