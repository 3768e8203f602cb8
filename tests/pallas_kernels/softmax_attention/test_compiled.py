"""The real compilers take the kernels at the models' shapes; no T x T array is in a program."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import softmax_attention
from tests.pallas_kernels.compiled import TPUS, compile_for, custom_calls

pytestmark = pytest.mark.aot
GPUS = ("h100", "b200")
SPLASH = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]


def forward_and_gradients(target, H, G, T, *, packed, dtype=jnp.bfloat16):
    """The program of one call and its pullback, heads of 128."""

    def both(q, k, v, ids, d_out):
        out, pullback = jax.vjp(
            lambda q, k, v: softmax_attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids),
            *(q, k, v),
        )
        return out, pullback(d_out)

    q, kv = (jax.ShapeDtypeStruct((1, T, heads, 128), dtype) for heads in (H, G))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if packed else None
    return compile_for(target, both, q, kv, kv, ids, q)


# Text-01 has 64 and 8 heads, M2 48 and 8.
CASES = [
    pytest.param(64, 8, False, id="text_01"),
    pytest.param(48, 8, True, id="m2_packed"),
    pytest.param(64, 8, True, id="text_01_packed", marks=pytest.mark.nightly),
    pytest.param(48, 8, False, id="m2", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("H, G, packed", CASES)
@pytest.mark.parametrize("target", TPUS)
def test_tpu_programs_hold_splash_attention(target, H, G, packed):
    compiled = forward_and_gradients(target, H, G, 4096, packed=packed)
    text = compiled.as_text()
    assert "tpu_custom_call" in custom_calls(compiled)
    assert sorted(set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))) == SPLASH
    assert ("splash_mha_fwd_segmented" in text) == packed
    assert "while(" not in text, "the blockwise implementation loops"


@pytest.mark.parametrize("H, G, packed", CASES)
@pytest.mark.parametrize("target", GPUS)
def test_gpu_programs_hold_cudnn(target, H, G, packed):
    calls = custom_calls(forward_and_gradients(target, H, G, 4096, packed=packed))
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == 1
    # The backward of packed rows needs the forward's statistics, and runs it again for them.
    assert calls.count("__cudnn$fmhaSoftmax") == (2 if packed else 1)


@pytest.mark.parametrize(
    "target, times",
    [
        ("v5e", 7),
        *(pytest.param(target, 7, marks=pytest.mark.nightly) for target in TPUS[1:]),
        ("h100", 14),
    ],
)
def test_no_array_of_scores_at_32k(target, times):
    T, H = 32768, 64
    compiled = forward_and_gradients(target, H, 8, T, packed=True)
    assert not re.search(rf"\[(\d+,)*{T},(\d+,)*{T}[,\]]", compiled.as_text())
    # Of the queries' bytes: splash writes its logsumexp 128 times side by side, twice their size,
    # and takes them with heads first (4 times in all with libtpu 0.0.42, 6 with 0.0.50);
    # on GPUs the float32 copies of the blockwise branch count, which packed rows seldom take.
    assert compiled.memory_analysis().temp_size_in_bytes < times * T * H * 128 * 2


def test_what_cudnn_cannot_take_runs_blockwise_and_says_so(caplog):
    compiled = forward_and_gradients("h100", 8, 2, 1024, packed=False, dtype=jnp.float32)
    assert not [call for call in custom_calls(compiled) if "fmha" in call]
    assert "softmax_attention on hopper takes the slow path" in caplog.text
    assert "cuDNN's attention needs bfloat16, got float32" in caplog.text
