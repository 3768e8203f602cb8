"""cuDNN's packed layout is filled in rightly, on any machine; its numbers need an NVIDIA GPU.

cuDNN has no interpreter: without a GPU nothing here shows that its output is right, only that the
program holds it (test_compiled.py) and that it is told the right places.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.softmax_attention import cudnn
from pallas_kernels.softmax_attention.cases import Case
from tests.pallas_kernels.softmax_attention import contract, oracle

IDS = np.array([[0, 3, 3, 5, 5, 5, 0, 7], [1, 1, 1, 1, 0, 0, 2, 0]], np.int32)


def test_segments_of_all_rows_lie_one_after_the_other_as_elements_of_their_array():
    q, k = jnp.zeros((2, 8, 4, 16), jnp.bfloat16), jnp.zeros((2, 8, 2, 16), jnp.bfloat16)
    place = cudnn._place(jnp.asarray(IDS), q, k)
    first, length = np.array([1, 3, 7, 8, 14]), [2, 3, 1, 4, 1]
    assert place.length_BM.shape == (2, cudnn.SEGMENTS)
    assert place.length_BM.reshape(-1)[:6].tolist() == [*length, 0]
    assert place.length_BM.sum() == sum(length)
    # Places of no segment begin past the end; jax takes one place more a row.
    assert place.first_BM.shape == (2, cudnn.SEGMENTS + 1)
    assert place.first_BM.reshape(-1)[:6].tolist() == [*(first * 4 * 16), 16 * 4 * 16]
    assert place.kv_first_BM.reshape(-1)[:6].tolist() == [*(first * 2 * 16), 16 * 2 * 16]
    assert (place.kv_length_BM == place.length_BM).all()


@pytest.mark.parametrize(
    "fits, q_ids, kv_ids",
    [
        (True, IDS, IDS),
        (True, np.zeros((2, 8), np.int32), np.zeros((2, 8), np.int32)),
        (False, IDS, np.where(IDS == 5, 6, IDS)),
        (False, [[1, 1, 2, 2, 1, 1]], None),
        (False, [[1, 1, 0, 1, 1, 2]], None),
        (False, [[2, 2, 1, 1, 0, 0]], None),
        (True, [np.arange(1, cudnn.SEGMENTS + 1)], None),
        (False, [np.arange(1, cudnn.SEGMENTS + 2)], None),
    ],
)
def test_only_rows_that_the_layout_can_hold_are_given_to_it(fits, q_ids, kv_ids):
    q_ids = jnp.asarray(q_ids, jnp.int32)
    kv_ids = q_ids if kv_ids is None else jnp.asarray(kv_ids)
    assert cudnn._fits(q_ids, kv_ids) == fits


@pytest.mark.gpu_device
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("ids", [None, "rising", "returning"])
def test_output_and_gradients_on_a_gpu(heads, ids):
    H, G = heads
    case = Case(B=2, T=512, S=512, H=H, G=G, K=64, V=64)
    inputs = contract.make_inputs(case, packed=ids == "returning", dtype=jnp.bfloat16)
    inputs = inputs._replace(offset=None, q_ids=inputs.kv_ids)
    if ids == "rising":
        rows = [np.repeat([1, 2, 0, 4, 5, 0], [100, 60, 40, 200, 100, 12]), np.repeat([0, 3], 256)]
        inputs = inputs._replace(q_ids=np.int32(rows), kv_ids=np.int32(rows))
    found = contract.run("cudnn", inputs, with_ids=ids is not None)
    expected = oracle.attention(*inputs._replace(offset=np.zeros(2, np.int32)))
    # On an H200 dq was off by 2**-6.9 without segments, where plain XLA was by 2**-8. That cuDNN
    # rounds the gradients of scores to 8 bits before it multiplies them is likely, but not shown.
    contract.assert_close(found, expected, 2 * contract.BF16_TOLERANCE)
