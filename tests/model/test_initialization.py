"""How matrices start: with one deviation, or as DeepNorm has it."""

import dataclasses

import jax
import numpy as np
import pytest

from hybrid_jax import model as models
from hybrid_jax.checkpoint import leaves
from hybrid_jax.config import layers, presets
from hybrid_jax.config.model import DeepNorm
from hybrid_jax.config.presets import own
from hybrid_jax.model.params import MatrixDims, matrix_dims
from sharding import Logical

D, F, H, G, K = 256, 384, 4, 2, 64


@pytest.fixture(scope="module")
def arrays():
    """Parameters of two layers, lightning and softmax, with experts; by name."""
    config = own.hybrid(
        "deep",
        vocab_size=64,
        hidden_dim=D,
        num_layers=2,
        num_heads=H,
        num_kv_heads=G,
        head_dim=K,
        rotary_dim=K,
        ffn=layers.MoeFfn(
            num_experts=4, hidden_dim=F, router=layers.SoftmaxTopK(experts_per_token=2)
        ),
        period=2,
    )
    config = dataclasses.replace(config, initialization=DeepNorm())
    return jax.device_get(leaves.arrays(models.build(config)))


def test_deepnorm_scales_values_outputs_and_feed_forwards_alone(arrays):
    beta = (8 * 2) ** -0.25
    lightning, softmax = (f"stack.runs.{run}.mixer." for run in (0, 1))
    qkv = arrays[lightning + "qkv"]
    square = np.sqrt(2 / (D + H * K))
    expected = [
        (qkv[..., 0, :], square),
        (qkv[..., 1, :], square),
        (qkv[..., 2, :], square * beta),
        (arrays[lightning + "gate"], square),
        (arrays[lightning + "out"], square * beta),
        (arrays[softmax + "q"], square),
        (arrays[softmax + "k"], np.sqrt(2 / (D + G * K))),
        (arrays[softmax + "v"], np.sqrt(2 / (D + G * K)) * beta),
        (arrays[softmax + "out"], square * beta),
        (arrays["stack.runs.0.ffn.gate_up"], np.sqrt(2 / (D + F)) * beta),
        (arrays["stack.runs.1.ffn.down"], np.sqrt(2 / (D + F)) * beta),
        # As without: 0.02.
        (arrays["stack.runs.0.ffn.router"], 0.02),
        (arrays["embedding.table"], 0.02),
        (arrays["head.kernel"], 0.02),
    ]
    for value, std in expected:
        # The deviation of n draws is known to 1 / sqrt(2 n): four of these.
        np.testing.assert_allclose(value.std(), std, rtol=4 / np.sqrt(2 * value.size))


def test_the_report_has_its_gain_and_presets_start_as_before():
    # minimax.md, section 1.1: N = 80.
    assert DeepNorm().gain(80) == pytest.approx(0.19882, abs=1e-5)
    assert DeepNorm(beta=0.5).gain(80) == 0.5
    assert presets.get("minimax-text-01").initialization.gain(80) is None
    with pytest.raises(ValueError, match=r"beta must be > 0; got 0.0"):
        DeepNorm(beta=0.0)


def test_rows_are_what_a_product_sums_over():
    L = Logical
    assert matrix_dims((L.MODEL, L.HEADS, L.PARTS, L.HEAD_DIM)) == MatrixDims((0,), (1, 3))
    assert matrix_dims((L.HEADS, L.HEAD_DIM, L.MODEL)) == MatrixDims((0, 1), (2,))
    assert matrix_dims((L.EXPERTS, L.FFN, L.MODEL)) == MatrixDims((1,), (2,))
    for axes in [(L.MODEL, L.EXPERTS), (L.VOCAB, L.MODEL), (L.MODEL,), (L.HEADS, L.HEAD_DIM)]:
        assert matrix_dims(axes) is None
