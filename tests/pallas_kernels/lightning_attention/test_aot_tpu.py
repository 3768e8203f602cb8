"""The TPU compiler takes the kernels at the sizes of MiniMax-Text-01, within memory."""

import functools

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
_CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_HEADS, _SIZE, _WIDTH = 64, 128, 6144
_DECAYS = -np.asarray(2.0 ** (-np.arange(1, _HEADS + 1) / 8), np.float32)
_LONG, _SHORT = 131072, 8192


def _compile(chip, function, *arguments, **options):
    device = jax.sharding.SingleDeviceSharding(targets.devices(chip)[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments
    )
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return compiled.memory_analysis(), kernels


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _attend(q, k, v):
    return lightning_attention(q, k, v, _DECAYS)[0]


def _project(x, w_q, w_k, w_v):
    """As in the model: SiLU of a product with a weight that has heads."""
    product = functools.partial(jnp.einsum, "btd,dhk->bthk", x)
    return _attend(*(jax.nn.silu(product(w)) for w in (w_q, w_k, w_v)))


def _gradient(function, arguments):
    def loss(*arguments):
        return (function(*arguments).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, argnums=arguments)


def _qkv(length):
    return [_array(1, length, _HEADS, _SIZE)] * 3


def _share(memory, length):
    """Temporaries as a share of q, k and v together."""
    return memory.temp_size_in_bytes / (3 * 2 * length * _HEADS * _SIZE)


@pytest.mark.parametrize("chip", _CHIPS)
@pytest.mark.parametrize("length", [_SHORT, pytest.param(_LONG, marks=pytest.mark.nightly)])
def test_forward(chip, length):
    memory, kernels = _compile(chip, _attend, *_qkv(length))
    assert kernels == 1
    assert _share(memory, length) <= 0.3


@pytest.mark.parametrize("chip", _CHIPS)
@pytest.mark.parametrize("length", [_LONG, pytest.param(_SHORT, marks=pytest.mark.nightly)])
def test_gradient(chip, length):
    memory, kernels = _compile(chip, _gradient(_attend, (0, 1, 2)), *_qkv(length))
    assert kernels == 3  # out; dq; dk and dv
    assert _share(memory, length) <= 1.0
    if chip == "v5e":
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        total += memory.output_size_in_bytes
        assert length < _LONG or total <= targets.CHIPS[chip].hbm_bytes


@pytest.mark.parametrize("chip", _CHIPS)
def test_behind_projections(chip):
    weights = [_array(_WIDTH, _HEADS, _SIZE)] * 3
    memory, kernels = _compile(chip, _project, _array(1, _SHORT, _WIDTH), *weights)
    assert kernels == 1
    # q, k and v themselves are temporaries here.
    assert _share(memory, _SHORT) <= 1.3


@pytest.mark.parametrize("chip", _CHIPS)
def test_gradient_behind_projections(chip):
    """XLA may choose how dq, dk and dv are tiled, for what follows; on tpu7x it does."""
    weights = [_array(_WIDTH, _HEADS, _SIZE)] * 3
    function = _gradient(_project, (0, 1, 2, 3))
    memory, kernels = _compile(chip, function, _array(1, _SHORT, _WIDTH), *weights)
    assert kernels == 3
    # q, k and v, the same before SiLU, and the gradient of each: three of the four.
    assert _share(memory, _SHORT) <= 4.0


@pytest.mark.parametrize("chip", _CHIPS)
def test_segments(chip):
    def attend(q, k, v, ids):
        return lightning_attention(q, k, v, _DECAYS, segment_ids=ids)[0]

    ids = _array(1, _SHORT, dtype=jnp.int32)
    memory, kernels = _compile(chip, attend, *_qkv(_SHORT), ids)
    assert kernels == 1
    assert _share(memory, _SHORT) <= 0.3


@pytest.mark.parametrize("chip", _CHIPS)
def test_decoding_updates_states_in_place(chip):
    rows, slots = 128, 160
    state = functools.partial(_array, dtype=jnp.float32)
    token = [_array(rows, _HEADS, _SIZE)] * 3
    cases = [
        (lightning_decode, token, state(rows, _HEADS, _SIZE, _SIZE), []),
        (
            lightning_decode_slots, token, state(slots, _HEADS, _SIZE, _SIZE),
            [_array(rows, dtype=jnp.int32)],
        ),
        (lightning_extend, [_array(rows, 4, _HEADS, _SIZE)] * 3,
         state(rows, _HEADS, _SIZE, _SIZE), []),
    ]  # fmt: skip
    for function, qkv, states, more in cases:

        def step(q, k, v, states, *more, function=function):
            return function(q, k, v, _DECAYS, states, *more)

        memory, kernels = _compile(chip, step, *qkv, states, *more, donate_argnums=3)
        assert kernels == 1, function.__name__
        assert memory.alias_size_in_bytes >= 4 * states.size, function.__name__
        assert memory.temp_size_in_bytes < 0.1 * 4 * states.size, function.__name__
