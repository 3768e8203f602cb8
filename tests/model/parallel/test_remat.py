"""What each rematerialisation policy spares the backward pass of split layers."""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybrid_jax import model as models
from hybrid_jax.config import layers
from hybrid_jax.config.model import REMAT_POLICIES
from hybrid_jax.config.presets import own
from hybrid_jax.model import remat
from hybrid_jax.model.context import Context
from hybrid_jax.model.parallel import placement
from tests import aot

D, H, K, E, ROWS, LENGTH = 32, 4, 8, 8, 8, 64


def _config(policy: str):
    moe = layers.MoeFfn(
        num_experts=E, hidden_dim=16, router=layers.SoftmaxTopK(experts_per_token=2)
    )
    sizes = dict(vocab_size=64, hidden_dim=D, num_heads=H, num_kv_heads=2, head_dim=K, rotary_dim=K)
    config = own.hybrid("two runs of two", ffn=moe, num_layers=2, period=2, **sizes)
    pattern = tuple(dataclasses.replace(run, count=2) for run in config.pattern)
    return dataclasses.replace(config, pattern=pattern, remat=policy)


@functools.cache
def _gradient(policy: str):
    """Of two lightning and two softmax layers, rows split over 4 devices and experts over 2."""
    place = placement.make("expert=2,sequence=4", "long_context")
    graphdef, params = nnx.split(models.abstract(_config(policy)))
    ids_BT = jnp.ones((ROWS, LENGTH), jnp.int32)
    context = Context(ids_BT, ids_BT, placement=place)

    def loss(params, x_BTD):
        x_BTD, _ = nnx.merge(graphdef, params).stack(x_BTD, context)
        return jnp.sum(jnp.sin(x_BTD))

    x_BTD = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.float32)
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, x_BTD)


class Traffic(NamedTuple):
    """How often each kind of exchange stands in a program; a loop counts once."""

    states: int
    ring: int
    counts: int
    rows: int


def _traffic(policy: str) -> Traffic:
    """Before XLA, which on CPUs may undo a recomputation outside loops."""
    text = _gradient(policy).as_text()
    gathers = re.findall(r"stablehlo\.all_gather.* -> tensor<([^>]*)>", text)
    return Traffic(
        states=gathers.count(f"4x{ROWS // 2}x{H}x{K}x{K}xf32"),
        ring=text.count("stablehlo.collective_permute"),
        counts=gathers.count(f"2x1x{E}xi32"),
        # Rows of two devices, which the twin of the exchange for CPUs gathers.
        rows=len([one for one in gathers if re.fullmatch(rf"\d+x{D}xf32", one)]),
    )


# A ring of 4 softmax shards deals q, k and v and collects the output, two permutes each; k and v go
# round in two more before the loop and two in it. Experts: two exchanges a layer.
_AGAIN = {
    "none": Traffic(states=0, ring=0, counts=0, rows=0),
    "full": Traffic(states=1, ring=12, counts=2, rows=4),
    "save_dots": Traffic(states=0, ring=12, counts=2, rows=4),
    # Queries, keys and values are dealt again; nothing goes round.
    "save_mixer": Traffic(states=0, ring=6, counts=2, rows=4),
    "save_collectives": Traffic(states=0, ring=0, counts=0, rows=0),
}


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_what_is_kept_is_not_exchanged_again(policy):
    once, found = _traffic("none"), _traffic(policy)
    # One gather of states for each direction, and 4 exchanges of rows for each kind of layer.
    assert (once.states, once.rows) == (2, 8)
    assert Traffic(*(b - a for a, b in zip(once, found, strict=True))) == _AGAIN[policy]


def test_saved_products_are_not_made_again():
    full, saved = (
        _gradient(policy).as_text().count("stablehlo.dot_general")
        for policy in ("full", "save_dots")
    )
    # q, k, v, gate and out of a lightning layer, q, k, v and out of a softmax one, two routers; and
    # with the state what a shard writes into it.
    assert full - saved == 5 + 4 + 2 + 1


def test_every_policy_of_a_config_is_known():
    assert {"none", *remat.KEEP} == set(REMAT_POLICIES)


@pytest.mark.nightly
def test_what_is_kept_takes_memory_in_this_order():
    policies = ("full", "save_mixer", "save_collectives", "none")
    temporaries = [aot.temporary_bytes(_gradient(policy).compile()) for policy in policies]
    assert temporaries == sorted(temporaries)
    # save_mixer keeps little beside the layer's input; without a policy all is kept.
    assert temporaries[1] < 1.5 * temporaries[0] < 0.75 * temporaries[3]
