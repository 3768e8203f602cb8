"""FP8 blocks: what transformers reads out of them, and what quantising twice changes."""

import types

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from hybrid_jax.checkpoint import convert, fp8
from hybrid_jax.checkpoint.names import minimax
from hybrid_jax.checkpoint.opened import open_checkpoint
from tests.checkpoint import published

BF16 = ml_dtypes.bfloat16


def _weight(seed: int, shape=(200, 300), spread=4.0) -> np.ndarray:
    """Values over many octaves, zeros, and a block of nothing else."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape) * np.exp2(random.uniform(-spread, spread, shape) - 6)
    weight[random.random(shape) < 0.01] = 0
    weight[:128, :128] *= seed % 2
    return weight.astype(BF16).astype(np.float32)


@pytest.mark.parametrize("scale", ["power of two", "any"])
def test_transformers_reads_the_same_numbers(scale):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations import finegrained_fp8

    # Its blocks must divide the weight.
    stored, scale_inv = fp8.quantize(_weight(1, (256, 384)))
    if scale == "any":
        scale_inv *= np.random.default_rng(0).uniform(0.5, 1, scale_inv.shape).astype(np.float32)
    there = finegrained_fp8.Fp8Dequantize(types.SimpleNamespace()).convert(
        {
            "weight": torch.from_numpy(stored.view(np.uint8)).view(torch.float8_e4m3fn),
            "weight_scale_inv": torch.from_numpy(scale_inv),
        }
    )["weight"]
    assert there.dtype == torch.float32
    np.testing.assert_array_equal(fp8.dequantize(stored, scale_inv, fp8.BLOCK), there.numpy())


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.integers(0, 1 << 30), st.sampled_from([0.1, 4.0, 12.0, 60.0]))
def test_quantising_again_gives_the_same_bytes(seed, spread):
    stored, scale = fp8.quantize(_weight(seed, spread=spread))
    for dtype in (np.float32, BF16):
        between = fp8.dequantize(stored, scale, fp8.BLOCK).astype(dtype)
        again, scale_again = fp8.quantize(between)
        np.testing.assert_array_equal(again.view(np.uint8), stored.view(np.uint8))
        np.testing.assert_array_equal(scale_again, scale)


def test_every_value_is_the_nearest_that_its_block_can_hold():
    weight = _weight(3)
    stored, scale = fp8.quantize(weight)
    kept = fp8.dequantize(stored, scale, fp8.BLOCK)
    step = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:200, :300]
    # Three bits behind the point; near zero, steps of 2^-9 of the scale.
    error = np.abs(kept - weight)
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10)).all()
    # As large as fits: the largest value of a block lies in the top octave.
    top = np.abs(stored.astype(np.float32)).max()
    assert 240 <= top <= 448


def test_what_is_not_finite_is_refused():
    weight = _weight(0)
    weight[150, 7] = np.inf
    with pytest.raises(ValueError, match="finite weights only"):
        fp8.quantize(weight)


@pytest.mark.parametrize("format", ["hf", "hf-original", "orbax"])
def test_exported_blocks_come_back_as_they_were(tmp_path, format):
    config = published.original_config()
    source = published.write_directory(tmp_path / "bf16", config, published.tensors(config))
    convert(source, tmp_path / "fp8", format, "fp8")
    with open_checkpoint(tmp_path / "fp8") as there, open_checkpoint(source) as here:
        assert there.block == fp8.BLOCK
        weights = [name for name in there.rules if minimax.is_linear(name)]
        assert weights and set(there.scales) == set(weights)
        for name in there.rules:
            stored, made = here.source.read(name), dict(there.read([name], dequantize=True))[name]
            if name in there.scales:
                values, scales = fp8.quantize(stored)
                np.testing.assert_array_equal(made, fp8.dequantize(values, scales, fp8.BLOCK))
            else:
                np.testing.assert_array_equal(made, stored)
                assert made.dtype == stored.dtype
    # Once more through bfloat16: the same files.
    convert(tmp_path / "fp8", tmp_path / "wide", format, "bfloat16")
    convert(tmp_path / "wide", tmp_path / "again", format, "fp8")
    with open_checkpoint(tmp_path / "fp8") as there, open_checkpoint(tmp_path / "again") as again:
        assert there.source.tensors == again.source.tensors
        for name in there.source.tensors:
            first, second = (each.source.read(name) for each in (there, again))
            np.testing.assert_array_equal(first.view(np.uint8), second.view(np.uint8))


def test_what_cannot_become_blocks_is_said(tmp_path):
    config = published.m2_config()
    tensors = published.tensors(config)
    source = published.write_directory(tmp_path / "m2", config, tensors)
    convert(source, tmp_path / "fp8", "hf-original", "fp8")
    with pytest.raises(ValueError, match=r"is in FP8 already\. Without --dtype"):
        convert(tmp_path / "fp8", tmp_path / "again", "hf-original", "fp8")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "quantization, message",
    [
        ("fp8", "must be a mapping; got 'fp8'"),
        ({"quant_method": []}, r"quant_method \[\]"),
        ({"quant_method": "fp8", "weight_block_size": [1 << 40, 8]}, "two positive whole numbers"),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": 5},
            "modules_to_not_convert must be a list of names; got 5",
        ),
    ],
)
def test_a_quantisation_that_cannot_be_is_refused(quantization, message):
    with pytest.raises(ValueError, match=f"here: quantization_config.*{message}"):
        fp8.block_size({"quantization_config": quantization}, "here")
