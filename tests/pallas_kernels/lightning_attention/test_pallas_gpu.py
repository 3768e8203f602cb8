"""The GPU kernels, interpreted on the CPU, keep the contract as far as bfloat16 products can."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention
from pallas_kernels.errors import Unsupported
from pallas_kernels.lightning_attention import api
from pallas_kernels.lightning_attention.cases import Case
from scripts import rounding
from tests.pallas_kernels.lightning_attention import contract, decode_contract, oracle, text_01

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpret mode of Mosaic GPU kernels",
)


def _run(inputs, *, with_ids=True, interpret=True) -> oracle.Results:
    return contract.run("pallas_gpu", inputs, with_ids=with_ids, interpret=interpret)


def _assert_as_good_as_rounding(found: oracle.Results, expected: oracle.Results, slopes):
    """And the results that are not bfloat16 as close as their one rounded factor allows."""
    text_01.assert_as_good_as_rounding(found, expected, slopes)
    # States are sums of products with one factor rounded to 8 bits, the other exact; decays' own
    # gradient is computed in float32.
    same = {name: getattr(expected, name) for name in rounding.RESULTS}
    contract.assert_close(found._replace(**same, dlog_decay=expected.dlog_decay), expected, 2**-8)
    np.testing.assert_allclose(found.dlog_decay, expected.dlog_decay, rtol=1e-4)


@interpreted
def test_a_row_equals_the_recurrence():
    """Two warpgroups: two chunks of 128 tokens, the second one short; heads of two layers."""
    slopes = np.concatenate([text_01.slopes(0, [0, 63]), text_01.slopes(79, [0])])
    inputs = text_01.make_inputs(
        Case(batch=1, length=170, heads=3, key_dim=128, value_dim=64), slopes
    )
    found = _run(inputs, with_ids=False)
    assert [x.dtype for x in (found.out, found.final)] == [jnp.bfloat16, jnp.float32]
    _assert_as_good_as_rounding(found, oracle.attention(*inputs), slopes)


@interpreted
def test_packed_rows_equal_the_recurrence_whatever_padding_holds():
    """One warpgroup: every rule of `packed_ids`' first row, and a row of none."""
    slopes = text_01.slopes(0, [0, 63])
    ids = contract.packed_ids(149)[[0, 2]]
    inputs = text_01.make_inputs(
        Case(batch=2, length=149, heads=2, key_dim=64, value_dim=64), slopes, ids
    )
    is_real = (ids != 0)[:, :, None, None]
    spoilt = {name: jnp.where(is_real, getattr(inputs, name), jnp.nan) for name in ("q", "k", "v")}
    found = _run(inputs._replace(**spoilt))
    _assert_as_good_as_rounding(found, oracle.attention(*inputs), slopes)
    assert not np.asarray(found.out)[ids == 0].any()
    np.testing.assert_array_equal(found.final[1], inputs.initial[1])


@interpreted
@pytest.mark.parametrize("sizes", [(128, 128), (64, 128)])
def test_packed_rows_of_whole_heads(sizes):
    """Runs that cross the border of two warpgroups' rows, and blocks of scores off the diagonal."""
    slopes = np.concatenate([text_01.slopes(0, [0]), text_01.slopes(79, [0])])
    ids = np.repeat([[3, 0, 4, 5, 6, 7]], [60, 9, 190, 1, 30, 10], axis=1)
    inputs = text_01.make_inputs(Case(1, 300, 2, *sizes), slopes, ids)
    _assert_as_good_as_rounding(_run(inputs), oracle.attention(*inputs), slopes)


@interpreted
def test_slow_heads_of_a_long_row():
    """Were what is written rounded once, dk would lose 1.7 times its own rounding."""
    slopes = text_01.slopes(78, [20, 60])
    inputs = text_01.make_inputs(
        Case(batch=1, length=1024, heads=2, key_dim=128, value_dim=128), slopes
    )
    # Gradients of both signs: dk is then a sum in which most cancels.
    inputs = inputs._replace(
        initial=0 * inputs.initial, dfinal=0 * inputs.dfinal, dout=inputs.dout - jnp.bfloat16(0.5)
    )
    found = _run(inputs, with_ids=False)
    text_01.assert_as_good_as_rounding(found, oracle.attention(*inputs), slopes)


@interpreted
def test_one_token():
    inputs = text_01.make_inputs(
        Case(batch=1, length=1, heads=1, key_dim=64, value_dim=64), text_01.slopes(0, [0])
    )
    out, final = lightning_attention(
        *inputs[:4], initial_state=inputs.initial, implementation="pallas_gpu", interpret=True
    )
    expected = oracle.attention(*inputs)
    # One sum of products rounded to 8 bits.
    np.testing.assert_allclose(final, expected.final, rtol=2**-8, atol=2**-8)
    error = np.abs(np.asarray(out, np.float64) - expected.out).max()
    assert error <= 2**-8 * np.abs(expected.out).max()


def test_no_token():
    slopes = text_01.slopes(0, [0])
    inputs = text_01.make_inputs(Case(batch=1, length=0, heads=1, key_dim=64, value_dim=64), slopes)
    found = _run(inputs, with_ids=False, interpret=False)
    np.testing.assert_array_equal(found.final, inputs.initial)
    np.testing.assert_array_equal(found.dinitial, inputs.dfinal)


@interpreted
def test_no_read_of_memory_that_holds_nothing_and_no_race():
    """Shared memory holds NaN until something is written, and warpgroups wait for one another."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    slopes = text_01.slopes(0, [0])
    case = Case(batch=1, length=300, heads=1, key_dim=128, value_dim=64)
    inputs = text_01.make_inputs(case, slopes, np.repeat([[1, 0, 2]], [150, 5, 145], axis=1))
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    for ids in (None, inputs.ids):

        def attend(q, k, v, ids=ids):
            return lightning_attention(
                q, k, v, inputs.log_decay, segment_ids=ids, implementation="pallas_gpu",
                interpret=interpret,
            )[0]  # fmt: skip

        out, pullback = jax.vjp(attend, *inputs[:3])
        assert not interpret_pallas_call.get_races().races_found
        for x in (out, *pullback(inputs.dout)):
            assert np.isfinite(np.asarray(x, np.float32)).all()
        assert not interpret_pallas_call.get_races().races_found


@interpreted
class TestPallasGpuDecode(decode_contract.DecodeContract):
    """One token, a pool, a few tokens: float32 on the ordinary cores."""

    implementation = "pallas_gpu"
    interpret = True
    case = Case(batch=3, length=1, heads=4, key_dim=64, value_dim=32)


@pytest.mark.parametrize(
    ("dtype", "key_dim", "words"),
    [(jnp.float32, 64, "rounds no other inputs silently.*float32"), (jnp.bfloat16, 96, "K=96")],
)
def test_a_refusal_says_why(dtype, key_dim, words):
    inputs = contract.make_inputs(Case(1, 5, 2, key_dim, 64), dtype=dtype)
    with pytest.raises(Unsupported, match=words):
        lightning_attention(*inputs[:4], implementation="pallas_gpu")
    choices = api.choices(*inputs[:5], None)
    assert choices["hopper"].name == "xla"


def test_the_choice_by_target():
    inputs = contract.make_inputs(Case(1, 5, 2, 128, 128), dtype=jnp.bfloat16)
    choices = api.choices(*inputs[:5], None)
    assert choices["hopper"].name == "pallas_gpu"
    assert choices["blackwell"].name == "xla"
    assert "not for blackwell" in choices["blackwell"].refusals["pallas_gpu"]
