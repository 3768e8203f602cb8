"""The border: what the op refuses, and what it returns for empty sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import softmax_attention


def _call(q=(2, 3, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 6), dtypes=("float32",) * 3, **kwargs):
    arrays = (jnp.zeros(shape, dtype) for shape, dtype in zip((q, k, v), dtypes))
    return softmax_attention(*arrays, **kwargs)


_IDS = {"q_segment_ids": np.ones((2, 3), np.int32), "kv_segment_ids": np.ones((2, 5), np.int32)}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"q": (3, 4, 8)}, r"q of shape \[B T H K\], got shape \(3, 4, 8\)"),
        ({"k": (2, 5, 2, 7)}, r"to match q .* k \(2, 5, 2, 7\)"),
        ({"v": (2, 6, 2, 6)}, r"to match q .* v \(2, 6, 2, 6\)"),
        ({"q": (2, 3, 5, 8)}, "H a multiple of key-value heads G >= 1, got K=8, H=5, G=2"),
        ({"q": (2, 3, 4, 0), "k": (2, 5, 2, 0)}, "head size K >= 1"),
        ({"dtypes": ("float32", "bfloat16", "bfloat16")}, "one dtype.*cast them before"),
        ({"dtypes": ("int32",) * 3}, "float32 or bfloat16, got int32"),
        ({"q_segment_ids": _IDS["q_segment_ids"]}, "got q_segment_ids alone"),
        ({**_IDS, "kv_segment_ids": _IDS["q_segment_ids"]}, r"integers of shape \(2, 5\)"),
        (
            {"q_offset": np.zeros(2, np.float32)},
            r"q_offset as integers of shape \(2,\), got float32",
        ),
        ({"q_offset": np.int32(0)}, r"got int32 of shape \(\)"),
        ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of 'splash', 'cudnn'"),
    ],
)
def test_a_mistake_of_the_caller_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _call(**kwargs)


@pytest.mark.parametrize(
    "shapes",
    [
        {"q": (2, 0, 4, 8)},
        {"k": (2, 0, 2, 8), "v": (2, 0, 2, 6)},
        {"q": (0, 3, 4, 8), "k": (0, 5, 2, 8), "v": (0, 5, 2, 6)},
    ],
)
def test_empty_sizes_give_zeros(shapes):
    out = _call(**shapes)
    assert out.shape == (*shapes.get("q", (2, 3, 4, 8))[:3], 6)
    assert (out == 0).all()
