"""A part of a tensor costs the bytes it needs, in few reads, and nothing may change meanwhile."""

import contextlib
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.checkpoint.boxes import Box, hull
from hybrid_jax.checkpoint.formats.files import LocalFile
from hybrid_jax.checkpoint.formats.hf_directory import HfDirectory
from hybrid_jax.checkpoint.formats.runs import reads
from hybrid_jax.checkpoint.formats.safetensors import SafetensorsFile
from tests.checkpoint.published import write_directory, write_safetensors


def boxes(shape):
    """Any box in an array, empty ones too."""
    bounds = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*bounds).map(lambda b: Box(tuple(x for x, _ in b), tuple(y for _, y in b)))


SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(st.data(), SHAPES, st.sampled_from([0, 2, 8, 30]), st.sampled_from([2, 10, 64, 1 << 20]))
@settings(max_examples=200, deadline=None)
def test_reads_give_every_value_of_a_part_once(data, shape, gap_bytes, most_bytes):
    part = data.draw(boxes(shape))
    stored = np.arange(math.prod(shape), dtype=np.uint16)
    raw, found = stored.tobytes(), np.zeros(part.shape or (1,), np.uint16)
    end = 0
    for read in reads(shape, part, 2, gap_bytes, most_bytes):
        # In the order of the file, none twice, and no gap read that is longer than allowed.
        assert read.offset >= end and read.offset + read.nbytes <= len(raw)
        end = read.offset + read.nbytes
        assert read.nbytes <= max(most_bytes, math.prod(read.shape[1:]) * (2 + gap_bytes))
        assert read.is_dense == (read.nbytes == 2 * math.prod(read.shape))
        span = raw[read.offset : end]
        found[read.where] += np.ndarray(read.shape, np.uint16, span, strides=read.strides)
    assert np.array_equal(found.reshape(part.shape), stored.reshape(shape)[part.slices])


def _sizes(shape, box, gap_bytes):
    return [read.nbytes for read in reads(shape, box, 2, gap_bytes, 1 << 20)]


def test_short_gaps_are_read_along_and_long_ones_skipped():
    half = Box((0, 0, 0), (8, 50, 100))
    assert _sizes((8, 100, 100), half, 9_999) == [10_000] * 8
    # The last run ends the only read.
    assert _sizes((8, 100, 100), half, 10_000) == [7 * 20_000 + 10_000]
    assert _sizes((8, 100, 100), Box((2, 0, 0), (5, 100, 100)), 0) == [60_000]
    # One row of one block is one run, whatever lies around it.
    assert _sizes((8, 100, 100), Box((2, 7, 10), (3, 8, 20)), 0) == [20]


@given(st.data(), SHAPES, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_pieces_tile_a_box_in_order(data, shape, most):
    box = data.draw(boxes(shape))
    count = np.zeros(shape, np.int64)
    order = np.arange(math.prod(shape)).reshape(shape)
    last = -1
    for piece in box.pieces(most):
        count[piece.slices] += 1
        assert piece.size <= most
        if piece.size:
            assert order[piece.slices].min() > last
            last = order[piece.slices].max()
    assert count.sum() == box.size and (count[box.slices] == 1).all()


def test_boxes_meet_and_are_counted_from_one_another():
    one, other = Box((0, 2), (4, 6)), Box((3, 0), (9, 3))
    common = one.meet(other)
    assert common == Box((3, 2), (4, 3)) and common.within(one) == Box((3, 0), (4, 1))
    assert hull([one, other]) == Box((0, 0), (9, 6))
    assert one.meet(Box((4, 2), (5, 6))) is None
    assert Box.of((slice(None), slice(1, None)), (3, 4)) == Box((0, 1), (3, 4))


@pytest.mark.parametrize("gap_bytes, cost", [(0, 3 * 2 * 4), (40, 3 * 8 * 4 - 6 * 4)])
def test_bytes_read_are_counted(tmp_path, monkeypatch, gap_bytes, cost):
    monkeypatch.setattr(LocalFile, "gap_bytes", gap_bytes)
    array = np.arange(96, dtype=np.float32).reshape(12, 8)
    write_safetensors(tmp_path / "model.safetensors", {"before": array[:1], "a": array})
    with contextlib.closing(HfDirectory(tmp_path)) as directory:
        part = directory.read_part("a", (3, 4, 8), Box((0, 1, 2), (1, 4, 4)))
        assert np.array_equal(part, array.reshape(3, 4, 8)[0:1, 1:4, 2:4])
        assert directory.bytes_read == cost
        directory.read("before")
        assert directory.bytes_read == cost + 32


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 8)


def _overwrite(path):
    time = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"new!")
    # Two writes within a tick of the kernel's clock could not be told apart.
    os.utime(path, ns=(time + 1, time + 1))


def _replace(path):
    state = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [_truncate, _overwrite, _replace, os.unlink])
def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path, change):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones((64,), np.float32)})
    with contextlib.closing(SafetensorsFile(path)) as file:
        file.read("a")
        change(path)
        with pytest.raises(ValueError, match=r"model.safetensors has changed since it was opened"):
            file.read("a")


def test_a_shard_that_is_replaced_while_others_are_read_is_an_error(tmp_path):
    arrays = {f"t{i}": np.full((4,), i, np.float32) for i in range(4)}
    path = write_directory(tmp_path / "d", {}, arrays, shards=2)
    with contextlib.closing(HfDirectory(path)) as directory:
        names = directory.read_many(["t0", "t2"])
        next(names)
        _replace(path / "model-00002-of-00002.safetensors")
        with pytest.raises(ValueError, match=r"00002-of-00002.safetensors has changed"):
            list(names)
