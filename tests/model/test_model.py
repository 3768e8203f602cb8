"""Properties of every member of the family: causal, packed = separate, scanned = unrolled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import model as models
from tests.model import configs

# float32 with sums in another order: a few hundred roundings of 6e-8, for logits of about 5.
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.mark.parametrize("name", configs.FAMILY)
def test_a_token_changes_nothing_before_it(name):
    tokens = configs.tokens(1, 24)
    changed = tokens.copy()
    changed[0, 15] = (changed[0, 15] + 1) % configs.VOCAB
    before, after = configs.forward(name)(tokens), configs.forward(name)(changed)
    np.testing.assert_allclose(after[0, :15], before[0, :15], **CLOSE)
    assert np.abs(after[0, 15:] - before[0, 15:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("name", configs.FAMILY)
def test_packed_documents_equal_separate_ones(name):
    tokens = configs.tokens(2, 24)
    segment_ids = np.zeros((2, 24), np.int32)
    pieces = {(0, 0, 9): 1, (0, 9, 24): 2, (1, 0, 5): 7, (1, 5, 19): 3}
    for (row, start, end), segment in pieces.items():
        segment_ids[row, start:end] = segment
    packed = configs.forward(name)(tokens, segment_ids)
    assert np.isfinite(packed).all()
    for row, start, end in pieces:
        # Alone in a row of the same length: one compiled program for all.
        alone = np.zeros((1, 24), np.int32)
        ids = np.zeros((1, 24), np.int32)
        alone[0, : end - start] = tokens[row, start:end]
        ids[0, : end - start] = 1
        separate = configs.forward(name)(alone, ids)[0, : end - start]
        np.testing.assert_allclose(packed[row, start:end], separate, **CLOSE)


def test_one_segment_equals_no_segments():
    tokens = configs.tokens(1, 24)
    np.testing.assert_allclose(
        configs.forward("text_01")(tokens, np.full((1, 24), 5, np.int32)),
        configs.forward("text_01")(tokens),
        **CLOSE,
    )


def test_scanned_layers_equal_unrolled_ones():
    model, tokens = configs.built("text_01"), configs.tokens(1, 24)
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def unrolled(params):
        model = nnx.merge(graphdef, params)
        layers = model.trace(tokens)
        return len(layers), model.logits(model.norm(layers[-1]))

    count, logits = unrolled(params)
    assert count == model.config.num_layers == 6
    np.testing.assert_allclose(logits, configs.forward("text_01")(tokens), **CLOSE)


@functools.cache
def _gradients(config):
    """The gradient of a loss with respect to every parameter, as arrays by path."""
    graphdef, params = nnx.split(models.build(config), nnx.Param)
    tokens = configs.tokens(2, 12)

    @jax.jit
    @jax.grad
    def gradients(params):
        logits = nnx.merge(graphdef, params)(tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, :2])

    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(params))
    }


def test_every_parameter_has_a_gradient_but_the_selection_bias():
    for config in (configs.m2(), configs.odd()):
        for name, gradient in _gradients(config).items():
            assert np.isfinite(gradient).all(), name
            assert (np.abs(gradient).max() > 0) == ("correction_bias" not in name), name


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "save_dots"},
        {"remat": "save_collectives"},
        {"scan_layers": False},
        pytest.param({"remat": "full"}, marks=pytest.mark.nightly),
        pytest.param({"remat": "save_mixer"}, marks=pytest.mark.nightly),
    ],
)
def test_how_a_program_is_compiled_changes_no_gradient(change):
    # One repeat compiles in half the time.
    config = dataclasses.replace(configs.text_01(), repeats=1)
    kept = _gradients(config)
    changed = _gradients(dataclasses.replace(config, **change))
    for name, gradient in kept.items():
        # The same operations in programs that fuse them differently.
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(changed[name], gradient, rtol=0, atol=1e-4 * scale)


def test_bfloat16_keeps_its_borders():
    dtypes = dataclasses.replace(configs.m2().dtypes, parameters="bfloat16", compute="bfloat16")
    model = models.abstract(dataclasses.replace(configs.m2(), dtypes=dtypes))
    assert model.stack.runs[0].ffn.router.dtype == jnp.float32
    assert model.stack.runs[0].ffn.correction_bias.dtype == jnp.float32
    assert model.stack.runs[0].ffn.gate_up.dtype == jnp.bfloat16
    lightning = dataclasses.replace(configs.text_01(), dtypes=dtypes)

    def run():
        model = models.build(lightning)
        hidden = model.hidden(jnp.zeros((1, 4), jnp.int32), state=model.initial_state(1, 8))
        return hidden, model.logits(hidden.x_BTD)

    hidden, logits = jax.eval_shape(run)
    assert hidden.x_BTD.dtype == jnp.bfloat16
    assert hidden.state.entries[0].dtype == jnp.float32
    assert hidden.state.entries[1].k_BSGK.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32


def test_logical_axes_cover_every_dim_of_every_parameter():
    model = models.abstract(configs.odd())
    is_param = lambda leaf: isinstance(leaf, nnx.Param)
    leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1], is_leaf=is_param)
    assert leaves
    for param in leaves:
        assert len(models.logical_axes(param)) == len(param.shape)


@pytest.mark.parametrize(
    ("tokens", "keywords", "message"),
    [
        (np.zeros((2, 0), np.int32), {}, r"at least one row and one token; got shape \(2, 0\)"),
        (np.zeros((4,), np.int32), {}, r"integer array of shape \[batch, time\]; got int32 \(4,\)"),
        (np.zeros((1, 4), np.float32), {}, "integer array.*got float32"),
        (np.array([[0, configs.VOCAB]], np.int32), {}, "below vocab_size=48 .*; got 48"),
        (jnp.array([[-1, 0]]), {}, "not negative; got -1"),
        # In 32 bits it is 1.
        (np.array([[2**32 + 1]], np.int64), {}, "below vocab_size=48 .*; got 4294967297"),
        (
            np.zeros((1, 4), np.int32),
            {"segment_ids": np.zeros((1, 3), np.int32)},
            r"segment_ids must be an integer array of shape \(1, 4\)",
        ),
    ],
)
def test_bad_tokens_are_refused(tokens, keywords, message):
    with pytest.raises(ValueError, match=message):
        configs.built("m2")(tokens, **keywords)
