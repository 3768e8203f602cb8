"""Weights quantised as they are read: which, how exactly, from any format, and what is kept."""

import jax
import ml_dtypes
import numpy as np
import pytest
import qwix
from flax import nnx

import hybrid_jax
from hybrid_jax import model as models
from hybrid_jax.checkpoint import leaves
from hybrid_jax.model import quantized
from hybrid_jax.model.parallel import placement as placements
from tests.checkpoint import published
from tests.checkpoint.published import FP8_CONFIG, m2_config, original_config

# Per leaf of the tiny published models: the dims of a matrix that are summed over.
SUMMED = {"qkv": 0, "gate": 0, "q": 0, "k": 0, "v": 0, "out": (0, 1), "gate_up": -3, "down": -2}
SHARED = {"gate_up": 0, "down": 0}


def _write(path, config, tensors):
    return published.write_directory(path, config, tensors)


def _is_matrix(name: str) -> bool:
    return name.split(".")[-1] in SUMMED


def test_int8_is_the_nearest_of_256_steps_of_each_output(tmp_path):
    config = original_config(shared_intermediate_size=5)
    directory = _write(tmp_path / "m", config, published.tensors(config))
    exact = leaves.arrays(hybrid_jax.load(directory))
    model = hybrid_jax.load(directory, quantize="int8")
    found = leaves.arrays(model)
    assert sum(map(_is_matrix, exact)) == 3 + 4 + 2 * 4
    for name, weight in exact.items():
        if not _is_matrix(name):
            # Norms, routers, coefficients, embedding and head.
            assert found[name].dtype == weight.dtype, name
            np.testing.assert_array_equal(found[name], weight, err_msg=name)
            continue
        assert isinstance(found[name], qwix.QArray), name
        assert found[name].qvalue.dtype == np.int8
        own = SHARED if ".shared." in name else SUMMED
        summed = own[name.split(".")[-1]]
        # Two dims of stacked layers come first.
        dims = tuple(d if d < 0 else d + 2 for d in np.atleast_1d(summed).tolist())
        step = np.abs(weight).max(dims, keepdims=True) / np.float32(127.5)
        np.testing.assert_allclose(found[name].scale, step, rtol=1e-6)
        error = np.abs(quantized.wide(found[name], np.float32) - weight)
        # Half a step, and the rounding of float32.
        assert (error <= 0.5001 * step).all(), name
        assert (np.abs(found[name].qvalue.astype(np.int32)).max(dims) >= 127).all(), name
    # Matrices take a quarter of float32; with rows of 12 there are many scales.
    assert models.count(model) == models.count(hybrid_jax.load(directory))
    matrices = sum(x.size for name, x in exact.items() if _is_matrix(name))
    rest = sum(x.size for name, x in exact.items() if not _is_matrix(name))
    scales = sum(found[name].scale.size for name in exact if _is_matrix(name))
    assert models.size_in_bytes(model) == matrices + 4 * (rest + scales)


def test_fp8_of_a_release_stays_as_it_is_stored(tmp_path):
    # Blocks of 8 rows cross heads of 6 channels, and the last block of 10 rows is short.
    for config in (m2_config(), original_config()):
        config |= {"quantization_config": FP8_CONFIG}
        tensors = published.quantised(published.tensors(config))
        directory = _write(tmp_path / config["model_type"], config, tensors)
        exact = leaves.arrays(hybrid_jax.load(directory))
        found = leaves.arrays(hybrid_jax.load(directory, quantize="fp8"))
        kept = 0
        for name, weight in exact.items():
            if name.endswith("mixer.gate"):
                # Not FP8 in these tensors: made of bfloat16.
                continue
            kept += weight.size * _is_matrix(name)
            # One float32 product each: equal to the bit.
            np.testing.assert_array_equal(quantized.wide(found[name], weight.dtype), weight)
        stored = [x for x in tensors.values() if x.dtype == ml_dtypes.float8_e4m3fn]
        assert kept == sum(x.size for x in stored) > 0


def test_fp8_is_made_of_other_weights(tmp_path):
    config = original_config()
    directory = _write(tmp_path / "m", config, published.tensors(config))
    exact = leaves.arrays(hybrid_jax.load(directory))
    found = leaves.arrays(hybrid_jax.load(directory, quantize="fp8"))
    for name in filter(_is_matrix, exact):
        error = np.abs(quantized.wide(found[name], np.float32) - exact[name])
        # Three bits after the point: 1/16 of a number, or of the smallest normal one of its tile.
        tiles = np.abs(exact[name]) / 16
        assert (error <= np.maximum(tiles, np.abs(exact[name]).max() / 448 / 64)).all(), name


@pytest.mark.parametrize("scheme", quantized.DTYPES)
def test_every_format_gives_the_same(tmp_path, scheme):
    config = m2_config()
    directory = _write(tmp_path / "m", config, published.tensors(config))
    hybrid_jax.save(hybrid_jax.load(directory), tmp_path / "orbax", format="orbax")
    one, other = (
        leaves.arrays(hybrid_jax.load(path, quantize=scheme))
        for path in (directory, tmp_path / "orbax")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("scheme", quantized.DTYPES)
def test_parts_go_straight_to_their_devices(tmp_path, scheme):
    config = m2_config() | {"quantization_config": FP8_CONFIG}
    directory = _write(tmp_path / "m", config, published.quantised(published.tensors(config)))
    # 10 columns in blocks of 2 over two devices: the third block is cut in two.
    placement = placements.make("data=4,tensor=2", "serve")
    found = hybrid_jax.load(directory, quantize=scheme, placement=placement)
    whole = hybrid_jax.load(directory, quantize=scheme)
    placed = placement.place(nnx.split(whole)[1])
    for one, other in zip(jax.tree.leaves(nnx.split(found)[1]), jax.tree.leaves(placed)):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    down = found.stack.runs[0].ffn.down.get_raw_value()
    assert down.qvalue.sharding.shard_shape(down.shape)[-2:] == (5, 12)
    scale_rows = {"int8": 1, "fp8": 5}[scheme]
    assert down.scale.sharding.shard_shape(down.scale.shape)[-2] == scale_rows


def test_a_stack_is_quantised_as_each_of_its_matrices():
    stack = np.random.default_rng(0).standard_normal((2, 3, 6, 2, 4)).astype(np.float32)
    # Two layers of three experts, as a run stores them: matrix by matrix, and all at once.
    for scheme, own in (("int8", (1, 6, 1, 1)), ("fp8", (1, 3, 1, 2))):
        values, scales = quantized.quantize_on_host(stack, scheme, own)
        whole = quantized.quantize(jax.numpy.asarray(stack), scheme, own)
        np.testing.assert_array_equal(values, whole.qvalue)
        np.testing.assert_allclose(scales, whole.scale, rtol=1e-6)


def test_what_cannot_be_is_refused(tmp_path):
    config = m2_config()
    directory = _write(tmp_path / "m", config, published.tensors(config))
    with pytest.raises(ValueError, match="one of int8, fp8; got 'int4'"):
        hybrid_jax.load(directory, quantize="int4")
    model = hybrid_jax.load(directory, quantize="int8")
    with pytest.raises(ValueError, match="rounded away is lost"):
        hybrid_jax.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
