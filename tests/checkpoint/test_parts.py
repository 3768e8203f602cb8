"""Any part of a parameter is the same cut of the whole, from the bytes that the part needs."""

import contextlib
import dataclasses
import functools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.checkpoint import convert, parts
from hybrid_jax.checkpoint.boxes import Box
from hybrid_jax.checkpoint.formats.files import LocalFile
from hybrid_jax.checkpoint.formats.orbax import OrbaxDirectory
from hybrid_jax.checkpoint.opened import open_checkpoint
from tests.checkpoint import published
from tests.checkpoint.published import FP8_CONFIG, D, E, F, m2_config, original_config


def _fused(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The names of transformers' modules: experts of a layer in two tensors."""
    found = {n: a for n, a in tensors.items() if ".block_sparse_moe." not in n}
    for layer in range(layers):
        old, new = (f"model.layers.{layer}.{block}" for block in ("block_sparse_moe", "mlp"))
        found[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        w1, w2, w3 = (
            np.stack([tensors[f"{old}.experts.{e}.{part}.weight"] for e in range(E)])
            for part in ("w1", "w2", "w3")
        )
        found[f"{new}.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        found[f"{new}.experts.down_proj"] = w2
    return found


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """kind -> (open checkpoint, leaf -> the whole parameter by the rule for whole tensors)."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def make(kind: str):
            config = original_config(shared_intermediate_size=5)
            tensors = published.tensors(config)
            if kind == "fused":
                tensors = _fused(tensors, 3)
            elif kind == "fp8":
                config = m2_config(quantization_config=FP8_CONFIG)
                tensors = published.quantised(published.tensors(config))
            place = tmp_path_factory.mktemp(kind)
            path = published.write_directory(place / "d", config, tensors, shards=2)
            if kind == "orbax":
                convert(path, place / "orbax", "orbax")
                path = place / "orbax"
            checkpoint = opened.enter_context(open_checkpoint(path))
            return checkpoint, _whole(checkpoint, tensors)

        yield make


def _whole(checkpoint, tensors) -> dict[str, np.ndarray]:
    leaves = {leaf: np.full(shape, np.nan, np.float32) for leaf, shape in checkpoint.shapes.items()}
    for name, rule in checkpoint.rules.items():
        is_fp8 = name in checkpoint.scales
        values = published.dequantised(tensors, name) if is_fp8 else tensors[name]
        leaves[rule.leaf][rule.slices()] = rule.to_block(values.astype(np.float32))
    return leaves


def _part(checkpoint, leaf, part, dtype=np.float32):
    found = np.full(part.shape, np.nan, dtype)
    count = 0
    for place, values in parts.read(checkpoint, leaf, part, dtype):
        assert values.shape == place.shape and values.flags.c_contiguous
        found[place.within(part).slices] = values
        count += values.size
    assert count == part.size
    return found


@pytest.mark.parametrize("kind", ["single", "fused", "fp8"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_equals_the_cut_of_the_whole(case, kind, data):
    checkpoint, leaves = case(kind)
    leaf = data.draw(st.sampled_from(sorted(leaves)))
    bounds = [
        data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda b: b[0] < b[1]))
        for n in leaves[leaf].shape
    ]
    part = Box(*map(tuple, zip(*bounds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PIECE_BYTES", data.draw(st.sampled_from([8, 100, 1 << 20])))
        patch.setattr(LocalFile, "gap_bytes", data.draw(st.sampled_from([0, 20, 1 << 14])))
        found = _part(checkpoint, leaf, part)
    assert np.array_equal(found, leaves[leaf][part.slices])


def test_whole_parameters_are_the_same_from_every_container(case):
    for kind in ("single", "orbax"):
        checkpoint, leaves = case(kind)
        for leaf, wanted in leaves.items():
            assert np.array_equal(_part(checkpoint, leaf, Box.whole(wanted.shape)), wanted)
    # From a container without ranges a part costs its tensors, and no others.
    checkpoint, leaves = case("orbax")
    assert isinstance(checkpoint.source, OrbaxDirectory)
    leaf = "stack.runs.0.mixer.out"
    before = checkpoint.source.bytes_read
    part = Box.whole(leaves[leaf].shape)
    part = dataclasses.replace(part, begin=(0, 1, *part.begin[2:]), end=(1, 2, 1, *part.end[3:]))
    assert np.array_equal(_part(checkpoint, leaf, part), leaves[leaf][part.slices])
    assert checkpoint.source.bytes_read - before == 2 * math.prod(leaves[leaf].shape[2:])


def test_a_part_costs_its_own_bytes_and_the_scales_of_its_blocks(case, monkeypatch):
    monkeypatch.setattr(LocalFile, "gap_bytes", 0)

    def cost(kind, leaf, *bounds):
        checkpoint, leaves = case(kind)
        before = checkpoint.source.bytes_read
        _part(checkpoint, leaf, Box.of(bounds, leaves[leaf].shape))
        return checkpoint.source.bytes_read - before

    one, every = slice(0, 1), slice(None)
    # Gate and up of one expert of one layer, half of their rows, in bfloat16.
    expert = one, one, slice(2, 3), every, every, slice(0, F // 2)
    assert cost("single", "stack.runs.0.ffn.gate_up", *expert) == 2 * D * (F // 2) * 2
    # FP8: rows 0 to 4 are in the first of two rows of blocks [8, 4], all columns in three.
    assert cost("fp8", "stack.runs.0.ffn.gate_up", *expert) == 2 * D * (F // 2) + 2 * 3 * 4
    # Head 1 of keys: rows 6 to 11 are in two rows of blocks; columns 4 to 7 in one.
    head = one, one, slice(4, 8), slice(1, 2), every
    assert cost("fp8", "stack.runs.0.mixer.k", *head) == 6 * 4 + 2 * 4


def test_weights_are_checked_and_cast_piece_by_piece(tmp_path, monkeypatch):
    config = original_config()
    tensors = published.tensors(config)
    tensors["lm_head.weight"][3, 2] = np.inf
    path = published.write_directory(tmp_path / "d", config, tensors)
    with open_checkpoint(path) as checkpoint:
        rows = Box((0, 4), (D, 32))
        found = _part(checkpoint, "head.kernel", rows, ml_dtypes.bfloat16)
        assert found.tobytes() == np.ascontiguousarray(tensors["lm_head.weight"][4:].T).tobytes()
        with pytest.raises(ValueError, match=r"'lm_head.weight' holds 1 val"):
            _part(checkpoint, "head.kernel", Box((0, 3), (D, 32)))
