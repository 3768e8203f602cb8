"""Whatever bytes a safetensors file has: refused by name, or read as the library reads them."""

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_jax.checkpoint.formats.protocol import DTYPES
from hybrid_jax.checkpoint.formats.safetensors import MAX_HEADER_BYTES, SafetensorsFile

safetensors = pytest.importorskip("safetensors")


class InMemory:
    """A file of these bytes, or one that is as long as it says and holds zeros behind them."""

    name, gap_bytes = "fuzzed.safetensors", 0

    def __init__(self, data: bytes, size: int | None = None):
        self._data, self.size = data, len(data) if size is None else size
        self.longest = 0

    def read_into(self, offset, target):
        self.longest = max(self.longest, len(target))
        data = self._data[offset : offset + len(target)]
        target[: len(data)] = data
        return max(0, min(len(target), self.size - offset))

    def check_unchanged(self):
        pass

    def close(self):
        pass


def check(data: bytes) -> bool:
    """Hold our reading against the library's; whether we read it."""
    try:
        file = SafetensorsFile("fuzzed.safetensors", InMemory(data))
    except ValueError as error:
        assert str(error).startswith("fuzzed.safetensors"), error
        # Printable, whatever names are in it, and not as long as the file.
        assert len(str(error).encode()) < 1000 + 2 * len(data)
        return False
    theirs = dict(safetensors.deserialize(data))
    assert set(file.tensors) == set(theirs)
    for name, info in file.tensors.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert file.read(name).tobytes() == bytes(theirs[name]["data"]), name
    return True


def framed(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes(data):
    check(data)


TENSOR = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}%s}'


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_header_with_damaged_bytes(data):
    header = bytearray(TENSOR % b',"__metadata__":{"x":"y"}')
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(header) - 1))
        change = data.draw(
            st.sampled_from([b"", b"0", b"-", b"[", b'"', b",", b"e", b"\x00", b"."])
        )
        header[place : place + data.draw(st.integers(0, 3))] = change
        if not header:
            header = bytearray(b"{")
    check(framed(bytes(header), b"xy"))


SIZES = st.one_of(st.integers(0, 3), st.sampled_from([-1, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 1.0]))
DTYPE = st.sampled_from([*DTYPES, "F8_E8M0", "F4", "f32", "", "BF16 "])
ODD = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.just([]), st.just({}))


@st.composite
def headers(draw):
    """Entries that fit together, but for what is drawn to be wrong."""
    entries, place = {}, 0
    for name in draw(st.lists(st.text(max_size=3), max_size=3, unique=True)):
        dtype, shape = draw(DTYPE), draw(st.lists(SIZES, max_size=3))
        size = DTYPES[dtype].itemsize if dtype in DTYPES else 1
        end = place + int(abs(np.prod([float(n) for n in shape])) * size) if shape else place + size
        end = min(end, place + 200)
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        for key in draw(st.lists(st.sampled_from([*entry, "more"]), max_size=1)):
            entry[key] = draw(st.one_of(ODD, st.lists(SIZES, max_size=3)))
        entries[name], place = entry, end
    for value in draw(st.lists(st.one_of(ODD, st.just({"format": "pt"})), max_size=1)):
        entries["__metadata__"] = value
    return entries, place


@settings(max_examples=400, deadline=None)
@given(headers(), st.sampled_from([0, 0, 0, -1, 1]))
@example(({"a": {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}}, 0), 0)
@example(({"\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1), 0)
@example(({"__metadata__": {"x": 1}}, 0), 0)
@example(({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "b": 3}, 0), 0)
def test_a_header_of_odd_entries(drawn, more):
    entries, place = drawn
    check(framed(json.dumps(entries).encode(), bytes(max(0, place + more))))


@pytest.mark.parametrize(
    "header, is_read",
    [
        (TENSOR % b"", True),
        (TENSOR % b"   ", True),
        (b" " + TENSOR % b"", False),
        (TENSOR % b',"__metadata__":null', True),
        (TENSOR % b',"__metadata__":{"x":NaN}', False),
        (TENSOR.replace(b"[2]", b"[2.0]") % b"", False),
        (TENSOR.replace(b"[0,2]", b"[-0,2]") % b"", False),
        (TENSOR.replace(b"[2]", b"[" + b"9" * 5000 + b"]") % b"", False),
    ],
)
def test_python_is_not_more_lenient_than_the_format(header, is_read):
    assert check(framed(header, b"xy")) == is_read


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 100_000_000_000, (1 << 64) - 1])
def test_a_header_that_claims_gigabytes_costs_no_memory(length):
    data = length.to_bytes(8, "little") + b'{"a":' + b"[" * 1000
    file = InMemory(data, size=1 << 40)
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        SafetensorsFile("fuzzed.safetensors", file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.longest < 16 and peak < 1 << 20
