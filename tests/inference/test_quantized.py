"""Quantised weights: what they stand for, in every path of the model, and the memory they take."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import inference
from hybrid_jax import model as models
from hybrid_jax.config import presets
from hybrid_jax.inference import shapes
from hybrid_jax.model import quantized
from hybrid_jax.model.parallel import placed
from hybrid_jax.model.parallel import placement as placements
from pallas_kernels.grouped_swiglu import pallas_tpu_narrow, stacked
from sharding import Logical, rules
from tests.inference import answering
from tests.model import configs

# float32 with sums in another order, relative to logits of about 5.
CLOSE = {"rtol": 0, "atol": 2e-4}
# So small that tiny models have several in every matrix.
BLOCK = (8, 8)


# One program, where each operation would be one of its own.
_quantize = jax.jit(quantized.quantize_params, static_argnums=(1, 2))


@jax.jit
def _widen(params):
    widen = lambda param: param.replace(quantized.wide(param[...], jnp.float32))
    return jax.tree.map(widen, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.cache
def _pair(name, scheme):
    """(a quantised model, the model of plain arrays that its weights stand for)."""
    graphdef, params = nnx.split(configs.built(name))
    narrow = _quantize(params, scheme, BLOCK)
    return nnx.merge(graphdef, narrow), nnx.merge(graphdef, _widen(narrow))


@functools.partial(jax.jit, static_argnums=0)
def _whole(graphdef, params, tokens_BT):
    return nnx.merge(graphdef, params)(tokens_BT)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        # Dense and shared feed-forwards, tied and shifted embeddings, three heads.
        ("odd", "fp8"),
        *(
            pytest.param(name, scheme, marks=pytest.mark.nightly)
            for name, scheme in (
                *(("text_01", "fp8"), ("text_01", "int8"), ("odd", "int8")),
                *(("m2", "int8"), ("m2", "fp8")),
            )
        ),
    ],
)
def test_whole_and_cached_are_the_network_that_the_weights_stand_for(name, scheme):
    narrow, wide = _pair(name, scheme)
    tokens, lengths = configs.tokens(2, 24), np.array([16, 7])
    # One program for both sets of plain arrays.
    whole, original = (
        np.asarray(_whole(*nnx.split(model), tokens)) for model in (wide, configs.built(name))
    )
    graphdef, params = nnx.split(narrow)
    np.testing.assert_allclose(_whole(graphdef, params, tokens), whole, **CLOSE)
    # Rounding is no small thing to these weights: the original network is another.
    assert np.abs(whole - original).max() > 0.1
    logits, state = inference.prefill(
        narrow, tokens[:, :16], lengths, narrow.initial_state(2, 32), chunk=8
    )
    step = jax.jit(lambda params, *more: inference.decode_step(nnx.merge(graphdef, params), *more))
    for ahead in range(3):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], whole[row, length - 1 + ahead], **CLOSE)
        token = jnp.asarray(tokens[[0, 1], lengths + ahead])
        logits, state = step(params, token, state)


@functools.cache
def _quantised(name, scheme):
    graphdef, params = nnx.split(models.build(answering.MODELS[name]))
    return graphdef, _quantize(params, scheme, BLOCK)


@functools.cache
def _answers(name, scheme, rows, placement=None, steps=2):
    graphdef, params = _quantised(name, scheme)
    if placement is not None:
        params = placement.place(params)
    return answering.answers(nnx.merge(graphdef, params), rows, placement, steps)


@pytest.mark.parametrize(
    ("name", "scheme", "mesh", "rows", "steps"),
    [
        # 16 columns of an expert in blocks of 8, over 4 devices: parts end inside a block. Chunks
        # and single tokens go the same way through the weights: daily without the latter.
        ("m2", "fp8", "expert=2,tensor=4", 8, 0),
        *(
            pytest.param(*case, 2, marks=pytest.mark.nightly)
            for case in (
                ("text_01", "fp8", "expert=2,tensor=4", 8),
                ("text_01", "int8", "tensor=8", 1),
                ("m2", "int8", "data=2,expert=2,tensor=2", 8),
                ("m2", "fp8", "expert=8", 8),
            )
        ),
    ],
)
def test_a_mesh_changes_nothing(name, scheme, mesh, rows, steps):
    placement = placements.make(mesh, "serve")
    one, many = (_answers(name, scheme, rows, where, steps) for where in (None, placement))
    answering.assert_close(one, many)


@pytest.mark.nightly
def test_rows_that_travel_to_their_experts_meet_wide_weights(monkeypatch):
    monkeypatch.setattr(placed, "GATHERED_TOKENS", 0)
    # A placement of its own: programs are kept by placement.
    serve = dataclasses.replace(rules.get("serve"))
    placement = dataclasses.replace(placements.make("expert=8", "serve"), rules=serve)
    answering.assert_close(_answers("text_01", "fp8", 8), _answers("text_01", "fp8", 8, placement))


def _bytes(params) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("scheme", quantized.DTYPES)
@pytest.mark.parametrize("preset", ["minimax-text-01", "minimax-m2"])
def test_released_models_take_half_the_memory(preset, scheme):
    config = presets.get(preset)
    before, after = (_bytes(shapes.parameters(config, None, q)) for q in (None, scheme))
    # Half, and the head, the embedding, the scales: 0.5 to 0.8 % of the whole.
    assert 0.5 < after / before < 0.51


def test_scales_live_where_their_weights_do():
    placement = placements.make("expert=2,tensor=4", "serve")
    params = shapes.parameters(answering.MODELS["text_01"], placement, "int8")
    gate_up = params["stack"]["runs"][0]["ffn"]["gate_up"].get_raw_value()
    # [repeats, count, E, D, 2, F]: experts over two devices, their columns over four.
    assert gate_up.qvalue.sharding.shard_shape(gate_up.shape) == (2, 2, 4, 32, 2, 4)
    assert gate_up.scale.sharding.shard_shape(gate_up.scale.shape) == (2, 2, 4, 1, 2, 4)
    down = params["stack"]["runs"][0]["ffn"]["down"].get_raw_value()
    # [..., E, F, D]: the sum over rows is split, what they share is everywhere.
    assert down.qvalue.sharding.shard_shape(down.shape) == (2, 2, 4, 4, 32)
    assert down.scale.sharding.shard_shape(down.scale.shape) == (2, 2, 4, 1, 32)


def test_columns_of_a_release_divide_over_eight_devices():
    # 1,536 columns in blocks of 128 are 12 blocks; peers refuse them on 8 devices.
    placement = placements.make("tensor=8", "serve")
    params = shapes.parameters(presets.get("minimax-m2"), placement, "fp8")
    down = params["stack"]["runs"][0]["ffn"]["down"].get_raw_value()
    assert down.shape[-2:] == (1536, 3072)
    assert down.scale.shape[-2:] == (24, 24)
    assert down.scale.sharding.shard_shape(down.scale.shape)[-2:] == (3, 24)


@pytest.mark.parametrize("scheme", quantized.DTYPES)
def test_what_tpus_read_in_eight_bits_or_join_before_they_widen_it_is_the_same(scheme):
    # Two blocks of 8 in each dim of a matrix.
    L, E, D, F = 2, 3, 16, 16
    draw = np.random.default_rng(0)

    def weight(axes, *shape):
        own = quantized.tile(scheme, (Logical.EXPERTS, *axes), (E, *shape), BLOCK)
        values = draw.standard_normal((L, E, *shape)).astype(np.float32)
        return quantized.quantize(jnp.asarray(values), scheme, own)

    gate_up = weight((Logical.MODEL, Logical.PARTS, Logical.FFN), D, 2, F)
    down = weight((Logical.FFN, Logical.MODEL), F, D)
    x = jnp.asarray(draw.standard_normal((7, D)), jnp.float32)
    arguments = x, gate_up, down, jnp.array([3, 0, 4], jnp.int32), jnp.int32(1)
    expected, joined = (
        jax.jit(functools.partial(function, widen=quantized.wide))(*arguments)
        for function in (stacked.cut_out, stacked.cut_out_narrow)
    )
    apart = quantized.narrow((gate_up, down)).apart
    weights = (pallas_tpu_narrow.Weight(*apart(w)) for w in (gate_up, down))
    read = pallas_tpu_narrow.grouped_swiglu(x, *weights, *arguments[3:], interpret=True)
    for found in (joined, read):
        # The same products; fused differently, or scaled later, so rounded differently.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", quantized.DTYPES)
def test_one_expert_at_a_time_is_wide(scheme):
    D, F, E = 256, 512, 8
    config = configs.m2()

    def large(run):
        ffn = dataclasses.replace(run.layer.ffn, num_experts=E, hidden_dim=F)
        return dataclasses.replace(run, layer=dataclasses.replace(run.layer, ffn=ffn))

    pattern = tuple(map(large, config.pattern))
    config = dataclasses.replace(config, hidden_dim=D, pattern=pattern)
    arguments = shapes.decode_arguments(config, 1, 64, quantize=scheme)
    memory = inference.make_decode_step(config).lower(*arguments).compile().memory_analysis()
    expert = 4 * 3 * D * F
    assert memory.argument_size_in_bytes < config.num_layers * E * expert / 3
    # Both matrices of one in float32, and what a matrix is widened from.
    assert memory.temp_size_in_bytes < 2 * expert
