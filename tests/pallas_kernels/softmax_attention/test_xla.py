"""The blockwise implementation keeps the contract, and its promises on memory and work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import softmax_attention
from pallas_kernels.softmax_attention.cases import Case
from tests.pallas_kernels.softmax_attention import contract


class TestXla(contract.Contract):
    """Tile by tile."""

    implementation = "xla"


def test_the_gradient_does_not_store_the_scores():
    T, H = 4096, 4
    q, kv = (jax.ShapeDtypeStruct((1, T, heads, 64), jnp.float32) for heads in (H, 2))
    gradient = jax.grad(lambda *x: softmax_attention(*x, implementation="xla").sum(), (0, 1, 2))
    memory = jax.jit(gradient).lower(q, kv, kv).compile().memory_analysis()
    assert memory.temp_size_in_bytes < H * T * T * 4 / 5


_attend = jax.jit(functools.partial(softmax_attention, implementation="xla"))


def test_a_document_that_returns_does_not_see_the_tile_between():
    # Tiles of 256, each of one document; none is partly visible.
    inputs = contract.make_inputs(Case(B=1, T=768, S=768, H=1, G=1, K=4, V=4), packed=False)
    ids = np.repeat([[1, 2, 1]], 256, axis=1).astype(np.int32)
    inputs = inputs._replace(q_ids=ids, kv_ids=ids)
    contract.assert_close(contract.run("xla", inputs), contract.run("reference", inputs))


# NaN where no tile may look: work that is skipped cannot spread it.
@pytest.mark.parametrize("length", [1, 16])
def test_tiles_past_the_filled_part_of_a_cache_are_never_read(length):
    case = Case(B=8, T=length, S=1024, H=8, G=8, K=64, V=64, offset=100)
    inputs = contract.make_inputs(case, packed=False)
    k, v = (x.at[:, 512:].set(jnp.nan) for x in (inputs.k, inputs.v))
    assert np.isfinite(_attend(inputs.q, k, v, q_offset=inputs.offset)).all()


@pytest.mark.parametrize("packed", [False, True])
def test_tiles_above_the_diagonal_and_between_documents_are_never_read(packed):
    inputs = contract.make_inputs(Case(B=8, T=512, S=512, H=8, G=1, K=4, V=4), packed=False)
    early, late = slice(0, 256), slice(256, 512)
    if packed:
        ids = np.repeat([[1, 2]], 256, axis=1).repeat(8, axis=0).astype(np.int32)
        k = inputs.k.at[:, early].set(jnp.nan)
        out = _attend(inputs.q, k, inputs.v, q_segment_ids=ids, kv_segment_ids=ids)
        assert np.isfinite(out[:, late]).all()
    else:
        k = inputs.k.at[:, late].set(jnp.nan)
        assert np.isfinite(_attend(inputs.q, k, inputs.v)[:, early]).all()
