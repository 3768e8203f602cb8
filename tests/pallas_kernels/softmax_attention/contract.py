"""What every implementation of softmax attention promises; a test class inherits `Contract`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import softmax_attention
from pallas_kernels.softmax_attention.cases import Case
from tests.pallas_kernels.softmax_attention import oracle

# float32 sums of some hundred terms, relative to the largest number of the array.
TOLERANCE = 5e-6
# Results rounded to 8 bits; the backward reads the output as it was rounded, hence twice that.
BF16_TOLERANCE = 2**-7

# The chunk begins one before the last key of a tile of 256, where a clear tile would show too much.
CASES = {
    "one_token": Case(B=2, T=1, S=1, H=2, G=2, K=4, V=4),
    "odd_sizes": Case(B=2, T=37, S=37, H=3, G=3, K=8, V=5),
    "grouped_tiles": Case(B=3, T=600, S=600, H=8, G=2, K=8, V=16),
    "more_queries_than_keys": Case(B=1, T=50, S=20, H=2, G=1, K=8, V=8),
    "chunk_of_cache": Case(B=2, T=70, S=1100, H=4, G=1, K=8, V=8, offset=766),
    "decode": Case(B=8, T=1, S=600, H=8, G=4, K=64, V=64, offset=550),
    "decode_early": Case(B=8, T=1, S=600, H=8, G=4, K=64, V=64, offset=270),
}


class Inputs(NamedTuple):
    """One call with every optional argument, and the cotangent of its result."""

    q: Any
    k: Any
    v: Any
    q_ids: Any
    kv_ids: Any
    offset: Any
    d_out: Any


def make_inputs(case: Case, *, packed: bool, dtype=jnp.float32) -> Inputs:
    """Normal numbers off centre; rows differ in offset and, if packed, in their documents."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape) + 0.5, dtype)

    B, T, S = case.B, case.T, case.S
    q, d_out = normal(B, T, case.H, case.K), normal(B, T, case.H, case.V)
    k, v = normal(B, S, case.G, case.K), normal(B, S, case.G, case.V)
    offset = (case.offset + 3 * np.arange(B)).astype(np.int32)
    kv_ids, q_ids = np.ones((B, S), np.int32), np.ones((B, T), np.int32)
    if packed:
        kv_ids = np.stack([packed_ids(S, draw) for _ in range(B)])
        places = np.minimum(offset[:, None] + np.arange(T)[None], S - 1)
        q_ids = np.take_along_axis(kv_ids, places, axis=1)
    return Inputs(q, k, v, q_ids, kv_ids, offset, d_out)


def packed_ids(length: int, draw) -> np.ndarray:
    """Documents 1, 2 and 3, padding inside, document 1 again, and padding at the end."""
    ids = np.repeat([1, 2, 0, 3, 1, 0], -(-length // 6))[:length]
    return np.roll(ids, -int(draw.integers(0, 3))).astype(np.int32)


def run(implementation: str, inputs: Inputs, *, with_ids=True) -> oracle.Results:
    """All results of an implementation."""
    return oracle.Results(*_compiled(implementation, with_ids)(*inputs))


@functools.cache
def _compiled(implementation, with_ids):
    def results(q, k, v, q_ids, kv_ids, offset, d_out):
        ids = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids} if with_ids else {}

        def attend(q, k, v):
            return softmax_attention(q, k, v, q_offset=offset, implementation=implementation, **ids)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    return jax.jit(results)


def assert_close(found: oracle.Results, expected: oracle.Results, tolerance=TOLERANCE):
    """Each array against the largest of its expected numbers."""
    for name, ours, theirs in zip(oracle.Results._fields, found, expected, strict=True):
        theirs = np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, name
        error = np.abs(np.asarray(ours, np.float64) - theirs).max()
        assert error <= tolerance * np.abs(theirs).max(), f"{name}: {error}"


class Contract:
    """Outputs and gradients, however the call is cut. Subclasses set `implementation`."""

    implementation: str

    @pytest.mark.parametrize("name, packed", [
        ("one_token", False), ("odd_sizes", True), ("grouped_tiles", False),
        ("grouped_tiles", True), ("more_queries_than_keys", False), ("chunk_of_cache", False),
        ("decode", True), ("decode_early", False),
    ])  # fmt: skip
    def test_output_and_gradients(self, name, packed):
        inputs = make_inputs(CASES[name], packed=packed)
        found = run(self.implementation, inputs, with_ids=packed)
        assert_close(found, oracle.attention(*inputs))

    @pytest.mark.parametrize("name", ["odd_sizes", "decode"])
    def test_bfloat16_loses_no_more_than_its_own_rounding(self, name):
        inputs = make_inputs(CASES[name], packed=True, dtype=jnp.bfloat16)
        found = run(self.implementation, inputs)
        assert {x.dtype.name for x in found} == {"bfloat16"}
        assert_close(found, oracle.attention(*inputs), BF16_TOLERANCE)

    def test_a_packed_row_equals_its_documents_apart(self):
        inputs = make_inputs(CASES["grouped_tiles"], packed=False)
        ids = np.repeat([[1, 2, 3]], 200, axis=1).repeat(3, axis=0).astype(np.int32)
        packed = run(self.implementation, inputs._replace(q_ids=ids, kv_ids=ids))
        for start in range(0, 600, 200):
            part = slice(start, start + 200)
            apart = Inputs(*(x if x.ndim == 1 else x[:, part] for x in inputs))
            apart = run(self.implementation, apart, with_ids=False)
            assert_close(oracle.Results(*(x[:, part] for x in packed)), apart)

    def test_chunks_over_a_larger_cache_equal_the_whole(self):
        inputs = make_inputs(CASES["grouped_tiles"], packed=False)
        inputs = inputs._replace(offset=np.zeros(3, np.int32))
        whole = run(self.implementation, inputs, with_ids=False).out
        # Beyond the part a chunk may see the cache holds what would ruin every sum.
        k, v = (np.pad(x, ((0, 0), (0, 500), (0, 0), (0, 0)), constant_values=1e4)
                for x in (inputs.k, inputs.v))  # fmt: skip
        chunks = [
            run(self.implementation, Inputs(
                inputs.q[:, start : start + 150], k, v, None, None,
                np.full(3, start, np.int32), inputs.d_out[:, start : start + 150],
            ), with_ids=False).out
            for start in range(0, 600, 150)
        ]  # fmt: skip
        np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, atol=TOLERANCE)

    @pytest.mark.parametrize("length", [1, 30])
    def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(self, length):
        # Scores of 1e6: where exp overflows, a mask applied after it would leave NaN.
        inputs = make_inputs(Case(B=4, T=length, S=40, H=2, G=1, K=8, V=8), packed=False)
        inputs = inputs._replace(
            q=inputs.q * 1e3,
            k=inputs.k * 1e3,
            # Row 0 is padding, row 1 a document without keys, row 2 stands before the first key.
            q_ids=np.repeat([[0], [9], [1], [1]], length, axis=1).astype(np.int32),
            kv_ids=np.repeat([[0], [1], [1], [1]], 40, axis=1).astype(np.int32),
            offset=np.array([5, 5, -length, 5], np.int32),
        )
        found = run(self.implementation, inputs)
        assert all(np.isfinite(x).all() for x in found)
        assert all((np.asarray(x[:3]) == 0).all() for x in found)
        assert (np.abs(found.out[3]) > 0).any(axis=(0, 2)).all()

    def test_under_scan_and_checkpoint_the_gradient_is_the_same(self):
        inputs = make_inputs(CASES["odd_sizes"], packed=True)
        ids = {"q_segment_ids": inputs.q_ids, "kv_segment_ids": inputs.kv_ids}

        def layer(q, scale):
            out = softmax_attention(
                q, inputs.k, inputs.v, implementation=self.implementation, **ids
            )
            return q + scale * jnp.pad(out, ((0, 0), (0, 0), (0, 0), (0, 3))), None

        def loss(body, q):
            return jax.lax.scan(body, q, jnp.ones(2))[0].sum()

        plain = jax.jit(jax.grad(functools.partial(loss, layer)))(inputs.q)
        again = jax.jit(jax.grad(functools.partial(loss, jax.checkpoint(layer))))(inputs.q)
        np.testing.assert_allclose(again, plain, rtol=1e-6, atol=1e-6)
