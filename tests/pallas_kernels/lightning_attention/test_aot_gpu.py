"""The CUDA compiler takes the kernels at the sizes of MiniMax-Text-01, in registers and memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import targets
from pallas_kernels import (
    lightning_attention,
    lightning_decode,
    lightning_decode_slots,
    lightning_extend,
)

pytestmark = pytest.mark.aot
_HEADS, _SIZE, _WIDTH = 64, 128, 6144
_DECAYS = -np.asarray(2.0 ** (-np.arange(1, _HEADS + 1) / 8), np.float32)
_LONG, _SHORT = 131072, 8192


@pytest.fixture
def compiles(monkeypatch, tmp_path):
    """Compile for a Hopper; returns memory, kernels in the program, and ptxas' report of each."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def compile(function, *arguments, **options):
        device = jax.sharding.SingleDeviceSharding(targets.devices("h100")[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments
        )
        compiled = jax.jit(function, **options).lower(*arguments).compile()
        kernels = len(re.findall('custom_call_target="mosaic_gpu[^"]*"', compiled.as_text()))
        reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
        return compiled.memory_analysis(), kernels, reports

    return compile


def _spills(reports) -> int:
    """Bytes; a kernel that two programs share may be compiled, and reported, once."""
    found = [re.findall(r"(\d+) bytes spill (?:stores|loads)", report) for report in reports]
    assert found and all(found), reports
    return sum(int(n) for numbers in found for n in numbers)


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _attend(q, k, v, ids=None):
    return lightning_attention(q, k, v, _DECAYS, segment_ids=ids)[0]


def _project(x, w_q, w_k, w_v):
    """As in the model: a matrix product whose columns are cut into heads."""
    return _attend(*((x @ w).reshape(*x.shape[:2], _HEADS, _SIZE) for w in (w_q, w_k, w_v)))


def _gradient(function, arguments):
    def loss(*arguments):
        return (function(*arguments).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, argnums=arguments)


def _qkv(length, size=_SIZE):
    return [_array(1, length, _HEADS, size)] * 3


def _share(memory, length):
    """Temporaries as a share of q, k and v together."""
    return memory.temp_size_in_bytes / (3 * 2 * length * _HEADS * _SIZE)


@pytest.mark.parametrize("length", [_SHORT, pytest.param(_LONG, marks=pytest.mark.nightly)])
def test_forward(compiles, length):
    memory, kernels, reports = compiles(_attend, *_qkv(length))
    assert kernels == 1
    assert _share(memory, length) <= 0.3
    assert _spills(reports) == 0


@pytest.mark.parametrize("length", [_LONG, pytest.param(_SHORT, marks=pytest.mark.nightly)])
def test_gradient(compiles, length):
    memory, kernels, reports = compiles(_gradient(_attend, (0, 1, 2)), *_qkv(length))
    assert kernels == 4  # out; dq; dk; dv
    assert _share(memory, length) <= 1.0
    assert _spills(reports) == 0


def test_packed_rows(compiles):
    """Segments cost a table of two numbers a token, forward and backward."""
    function = _gradient(_attend, (0, 1, 2))
    ids = _array(1, _SHORT, dtype=jnp.int32)
    memory, kernels, reports = compiles(function, *_qkv(_SHORT), ids)
    assert kernels == 4
    assert _share(memory, _SHORT) <= 1.0
    assert _spills(reports) == 0


def test_head_size_64(compiles):
    _, kernels, reports = compiles(_gradient(_attend, (0, 1, 2)), *_qkv(_SHORT, 64))
    assert kernels == 4
    assert _spills(reports) == 0


@pytest.mark.parametrize("length", [1, 350])
@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_that_end_inside_a_tile(compiles, length, is_packed):
    """The interpreter reads any length; the compiler copies whole tiles of 8 rows alone."""
    ids = [_array(1, length, dtype=jnp.int32)] if is_packed else []
    _, kernels, _ = compiles(_gradient(_attend, (0, 1, 2)), *_qkv(length), *ids)
    assert kernels == 4


def test_behind_a_projection_nothing_is_copied(compiles):
    """The temporaries are q, k and v, and nothing beside them."""
    x, w = _array(1, _SHORT, _WIDTH), _array(_WIDTH, _HEADS * _SIZE)
    memory, kernels, _ = compiles(_project, x, w, w, w)
    assert kernels == 1
    assert _share(memory, _SHORT) <= 1.3


def test_decoding(compiles):
    """One token of many rows; the pool is updated where it lies; a few tokens cost one pass."""
    rows, slots = 128, 160
    q, pool = _array(rows, _HEADS, _SIZE), _array(slots, _HEADS, _SIZE, _SIZE, dtype=jnp.float32)
    state = _array(rows, _HEADS, _SIZE, _SIZE, dtype=jnp.float32)
    few = _array(rows, 5, _HEADS, _SIZE)

    def decode(q, state):
        return lightning_decode(q, q, q, _DECAYS, state)

    def decode_slots(q, pool, slots):
        return lightning_decode_slots(q, q, q, _DECAYS, pool, slots)

    def extend(few, state):
        return lightning_extend(few, few, few, _DECAYS, state)

    for function, arguments, donated in (
        (decode, (q, state), ()),
        (decode_slots, (q, pool, _array(rows, dtype=jnp.int32)), (1,)),
        (extend, (few, state), ()),
    ):
        memory, kernels, reports = compiles(function, *arguments, donate_argnums=donated)
        assert kernels == 1, function
        # No copy of a state: each is 4 MB.
        assert memory.temp_size_in_bytes < 2**20, function
        assert memory.alias_size_in_bytes == (4 * pool.size if donated else 0)
        assert _spills(reports) == 0
