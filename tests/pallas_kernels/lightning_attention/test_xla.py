"""The chunked implementation keeps the contract, in little memory and with any chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention
from pallas_kernels.lightning_attention import xla
from pallas_kernels.lightning_attention.cases import CASES
from tests.pallas_kernels.lightning_attention import contract


class TestXla(contract.Contract):
    """Chunk by chunk."""

    implementation = "xla"


@pytest.mark.parametrize("chunk", [1, 149, 256])
def test_the_chunk_changes_nothing_but_the_speed(chunk):
    ids = contract.packed_ids(CASES["odd"].length)
    inputs = contract.make_inputs(CASES["odd"]._replace(batch=len(ids)), ids)
    whole = contract.run("xla", inputs)
    out, final = jax.jit(xla.forward, static_argnames="chunk")(
        *map(jnp.asarray, inputs[:6]), chunk=chunk
    )
    contract.assert_close(whole._replace(out=out, final=final), whole)


def test_the_gradient_stores_neither_scores_nor_a_state_a_token():
    length, heads, size = 8192, 2, 64
    x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids):
        decays = np.asarray([-0.5, -0.01], np.float32)
        return lightning_attention(q, k, v, decays, segment_ids=ids)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    a_tensor = 4 * length * heads * size
    # Room for three tensors of the size of q; a state a chunk is 1, a state a token 64, and the
    # scores 128 of them.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * a_tensor


def test_an_unused_decay_gradient_costs_nothing():
    x = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)
    decays = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loops(argnums):
        def loss(q, k, v, log_decay):
            return lightning_attention(q, k, v, log_decay)[0].sum()

        gradient = jax.jit(jax.value_and_grad(loss, argnums))
        return gradient.lower(x, x, x, decays).compile().as_text().count(" while(")

    assert loops((0, 1, 2)) == 3  # outputs; dq; dk and dv
    assert loops((0, 1, 2, 3)) == 4
