"""One update on eight devices equals the one on a single device, whatever is split over them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from hybrid_jax.config import layers
from hybrid_jax.config import training as t
from hybrid_jax.config.presets import own
from hybrid_jax.model.parallel import placement as placements
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step
from tests.training import small

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


@functools.cache
def _update(model: str, mesh: str | None, rules: str = "expert"):
    """(state, metrics) after one update, on the host."""
    config = small.small_run(
        model=MODELS[model](),
        batch_size=8,
        schedule=t.Schedule(peak=1e-2, warmup_steps=0),
    )
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    placement = None if mesh is None else placements.make(mesh, rules)
    state = initial_state(config, skeleton, optimizer, placement)
    step = make_train_step(config, skeleton, optimizer, placement)
    batch = small.random_batch(8, 32)
    if placement is not None:
        batch = jax.device_put(batch, placement.sharding(*placements.ROWS))
    state, metrics = step(state, batch)
    return jax.device_get(state), jax.device_get(metrics)


# Each takes ten seconds to compile: daily, every way to split something, once.
_DAILY = [
    ("text-01", "fsdp", "fsdp=8"),
    ("text-01", "expert", "data=2,expert=2,tensor=2"),
    ("text-01", "long_context", "sequence=4,expert=2"),
    ("m2", "long_context", "fsdp=2,sequence=2,tensor=2"),
]
_NIGHTLY = [
    ("text-01", "fsdp_tensor", "data=2,fsdp=2,tensor=2"),
    ("text-01", "expert", "fsdp=2,expert=4"),
    ("text-01", "long_context", "sequence=8"),
    ("text-01", "serve", "expert=4,tensor=2"),
    ("m2", "fsdp", "fsdp=8"),
    ("m2", "fsdp_tensor", "data=2,fsdp=2,tensor=2"),
    ("m2", "expert", "fsdp=2,expert=4"),
    ("m2", "long_context", "sequence=4,expert=2"),
]


@pytest.mark.parametrize(
    ("model", "rules", "mesh"),
    [*_DAILY, *(pytest.param(*case, marks=pytest.mark.nightly) for case in _NIGHTLY)],
)
def test_an_update_is_the_same_wherever_it_is_computed(model, rules, mesh):
    state, metrics = _update(model, mesh, rules)
    expected, expected_metrics = _update(model, None)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # After one update AdamW's first moment is the gradient, but for a factor.
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(expected.optimizer),
        jax.tree.leaves(state.optimizer),
        strict=True,
    )
    for (path, value), found in pairs:
        scale = max(float(np.abs(value).max()), 1e-12)
        assert np.abs(found - value).max() <= 1e-5 * scale, jax.tree_util.keystr(path)
