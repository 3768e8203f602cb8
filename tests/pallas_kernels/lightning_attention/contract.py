"""What every implementation of lightning attention promises; a test class inherits `Contract`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention
from pallas_kernels.lightning_attention.cases import CASES, Case
from tests.pallas_kernels.lightning_attention import oracle

# One head each: none, the last layers', the first layer's fastest, and gone after one token.
LOG_DECAY = (0.0, -1e-5, -0.917, -20.0)
# float32 sums of some hundred terms: relative to the largest number of the head.
TOLERANCE = 3e-6
_LONG = ("q", "k", "v", "dout")


class Inputs(NamedTuple):
    """One call, and the cotangents of its two results."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    initial: Any
    ids: Any
    dout: Any
    dfinal: Any


def make_inputs(case: Case, ids=None, dtype=jnp.float32) -> Inputs:
    """Normal numbers off centre, so that no sum cancels and no term of any result vanishes."""
    draw = np.random.default_rng(0)
    batch, length, heads, key_dim, value_dim = case

    def normal(*shape):
        return (draw.standard_normal(shape) + 0.5).astype(np.float32)

    long = (batch, length, heads)
    q, k, v, dout = (
        jnp.asarray(normal(*long, size), dtype) for size in (key_dim, key_dim, value_dim, value_dim)
    )
    initial, dfinal = (normal(batch, heads, key_dim, value_dim) for _ in range(2))
    ids = np.ones((batch, length), np.int32) if ids is None else np.asarray(ids, np.int32)
    return Inputs(q, k, v, np.asarray(LOG_DECAY[:heads], np.float32), initial, ids, dout, dfinal)


def run(
    implementation: str, inputs: Inputs, *, with_ids=True, interpret: Any = False
) -> oracle.Results:
    """All results of an implementation."""
    return oracle.Results(*_compiled(implementation, with_ids, interpret)(*inputs))


@functools.cache
def _compiled(implementation, with_ids, interpret):
    def results(q, k, v, log_decay, initial, ids, dout, dfinal):
        def attend(q, k, v, log_decay, initial):
            return lightning_attention(
                q, k, v, log_decay, initial_state=initial,
                segment_ids=ids if with_ids else None, implementation=implementation,
                interpret=interpret,
            )  # fmt: skip

        found, pullback = jax.vjp(attend, q, k, v, log_decay, initial)
        return *found, *pullback((dout, dfinal))

    return jax.jit(results)


@functools.partial(jax.jit, static_argnames=("implementation", "interpret"))
def _attend(q, k, v, log_decay, initial, ids, *, implementation, interpret):
    return lightning_attention(
        q, k, v, log_decay, initial_state=initial, segment_ids=ids,
        implementation=implementation, interpret=interpret,
    )  # fmt: skip


def assert_close(found: oracle.Results, expected: oracle.Results, tolerance=TOLERANCE):
    """Each head by its own scale: a head that forgets has small numbers, not wrong ones."""
    head_dim = {"final": 1, "dinitial": 1, "dlog_decay": 0}
    for name, ours, theirs in zip(oracle.Results._fields, found, expected, strict=True):
        assert ours.shape == theirs.shape, name
        others = tuple(d for d in range(theirs.ndim) if d != head_dim.get(name, 2))
        error = np.abs(np.asarray(ours, np.float64) - theirs).max(axis=others, initial=0)
        scale = np.abs(theirs).max(axis=others, initial=0)
        assert (error <= tolerance * scale).all(), f"{name}: {error} of {scale} by head"


def packed_ids(length: int) -> np.ndarray:
    """Rows that try every rule: where runs begin and end, and where padding lies."""
    rows = [
        # leading padding, a run over a chunk's border, padding inside and between runs, an id
        # that comes again after another one (a new document), trailing padding
        [0] * 7 + [3] * 60 + [0] * 9 + [3] * 5 + [4] * 3 + [0] * 4 + [3] * 40 + [0] * 21,
        # several runs in one chunk, a run of one token, one that fills more than a chunk
        [1] * 20 + [2] * 1 + [5] * 30 + [2] * 98,
        # nothing but padding
        [0] * length,
        # padding that covers whole chunks in the middle of a run
        [9] * 3 + [0] * 140 + [9] * 6,
    ]
    return np.asarray(rows, np.int32)[:, :length]


class Contract:
    """Inherit, and name the implementation; `interpret` where it is a Pallas kernel."""

    implementation: str
    interpret: Any = False

    def run(self, inputs: Inputs, *, with_ids=True) -> oracle.Results:
        """All results."""
        return run(self.implementation, inputs, with_ids=with_ids, interpret=self.interpret)

    def test_one_segment_equals_the_recurrence(self):
        inputs = make_inputs(CASES["odd"])
        found = self.run(inputs, with_ids=False)
        assert_close(found, oracle.attention(*inputs))
        assert (found.out.dtype, found.final.dtype) == (jnp.float32, jnp.float32)

    def test_packed_rows_with_padding_equal_the_recurrence(self):
        ids = packed_ids(CASES["odd"].length)
        inputs = make_inputs(CASES["odd"]._replace(batch=len(ids)), ids)
        found = self.run(inputs)
        assert_close(found, oracle.attention(*inputs))
        assert not np.asarray(found.out)[ids == 0].any()
        np.testing.assert_array_equal(found.final[2], inputs.initial[2])

    def test_what_padding_holds_is_never_seen(self):
        ids = packed_ids(CASES["odd"].length)
        inputs = make_inputs(CASES["odd"]._replace(batch=len(ids)), ids)
        is_real = (ids != 0)[:, :, None, None]
        spoilt = {
            name: jnp.where(is_real, getattr(inputs, name), jnp.nan) for name in ("q", "k", "v")
        }
        found = self.run(inputs._replace(**spoilt))
        for ours, theirs in zip(found, self.run(inputs), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_packed_documents_equal_separate_ones(self):
        lengths = np.asarray([37, 64, 1, 47])
        starts = np.cumsum(lengths) - lengths
        ids = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)[None].repeat(4, axis=0)
        packed = make_inputs(CASES["odd"]._replace(batch=4), ids)
        # Every row the same, and then row d shifted so that it starts with document d, alone.
        packed = packed._replace(**{name: getattr(packed, name)[:1].repeat(4, 0) for name in _LONG})
        separate = packed._replace(
            **{
                name: jnp.stack([jnp.roll(getattr(packed, name)[0], -at, 0) for at in starts])
                for name in _LONG
            },
            initial=packed.initial * np.float32([1, 0, 0, 0])[:, None, None, None],
            dfinal=packed.dfinal * np.float32([0, 0, 0, 1])[:, None, None, None],
            ids=(np.arange(149)[None] < lengths[:, None]).astype(np.int32),
        )
        whole, parts = self.run(packed), self.run(separate)
        for name in ("out", "dq", "dk", "dv"):
            together = np.concatenate(
                [np.asarray(getattr(parts, name))[d, :n] for d, n in enumerate(lengths)]
            )
            # Other chunk borders sum in another order.
            scale = np.abs(together).max()
            row = 3 if name in ("dk", "dv") else 0
            assert np.abs(getattr(whole, name)[row] - together).max() <= TOLERANCE * scale, name
        np.testing.assert_allclose(whole.final[0], parts.final[3], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(whole.dinitial[0], parts.dinitial[0], rtol=1e-5, atol=1e-4)

    def test_splitting_anywhere_and_carrying_the_state_equals_the_whole(self):
        # Padding on both sides of every cut, and one document, so that the state is carried.
        ids = np.where(np.arange(149) % 7 == 3, 0, 5)[None].repeat(4, axis=0)
        inputs = make_inputs(CASES["odd"]._replace(batch=4), ids)
        whole = self.run(inputs)
        for cut in (49, 64, 85, 100):
            state, outs = inputs.initial, []
            for part in (slice(None, cut), slice(cut, None)):
                q, k, v, ids = (x[:, part] for x in (inputs.q, inputs.k, inputs.v, inputs.ids))
                out, state = _attend(
                    q,
                    k,
                    v,
                    inputs.log_decay,
                    state,
                    ids,
                    implementation=self.implementation,
                    interpret=self.interpret,
                )
                outs.append(out)
            split = whole._replace(out=jnp.concatenate(outs, axis=1), final=state)
            assert_close(split, whole)

    def test_bfloat16_inputs_lose_no_more_than_their_output_rounding(self):
        inputs = make_inputs(CASES["odd"], dtype=jnp.bfloat16)
        found = self.run(inputs, with_ids=False)
        expected = oracle.attention(*inputs)
        assert found.out.dtype == found.dq.dtype == jnp.bfloat16
        # Half a unit in the last of 8 bits for what is rounded; the rest stays float32.
        rounded = ("out", "dq", "dk", "dv")
        for name in rounded:
            ours, theirs = np.asarray(getattr(found, name), np.float64), getattr(expected, name)
            np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=1e-5 * np.abs(theirs).max())
        assert_close(
            found._replace(**{name: getattr(expected, name) for name in rounded}), expected
        )

    @pytest.mark.parametrize("length", [0, 1])
    def test_no_token_and_one_token(self, length):
        inputs = make_inputs(CASES["odd"]._replace(length=length))
        assert_close(self.run(inputs), oracle.attention(*inputs))
        assert_close(self.run(inputs, with_ids=False), oracle.attention(*inputs))
