"""The TPU kernels, interpreted on the CPU, keep the contract; head size 128 is read in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.errors import Unsupported
from pallas_kernels.lightning_attention import api
from pallas_kernels.lightning_attention.cases import Case
from tests.pallas_kernels.lightning_attention import contract, decode_contract, oracle, text_01

# Two chunks of 128 tokens and a part of one; heads in two whole tiles.
_TILED = Case(batch=1, length=300, heads=16, key_dim=128, value_dim=128)
_EVERY_FOURTH_HEAD = range(0, 64, 4)


class TestPallasTpu(contract.Contract):
    """Small heads, float32: the layout for everything but tiles."""

    implementation = "pallas_tpu"
    interpret = True

    def test_bfloat16_inputs_lose_no_more_than_their_output_rounding(self):
        """On an MXU of bfloat16 operands they do lose a little more: measured below."""
        inputs = contract.make_inputs(Case(2, 149, 4, 8, 5), dtype=jnp.bfloat16)
        found = self.run(inputs, with_ids=False)
        assert found.out.dtype == found.dq.dtype == jnp.bfloat16
        # Weights, states and decayed keys are rounded once to 8 bits before they are multiplied.
        contract.assert_close(found, oracle.attention(*inputs), tolerance=2**-7)


class TestPallasTpuDecode(decode_contract.DecodeContract):
    """One token, a pool, a few tokens."""

    implementation = "pallas_tpu"
    interpret = True


@pytest.mark.parametrize("layer", [0, 79])
def test_bfloat16_error_is_that_of_rounding_the_result(layer):
    slopes = text_01.slopes(layer, _EVERY_FOURTH_HEAD)
    inputs = text_01.make_inputs(_TILED, slopes)
    found = contract.run("pallas_tpu", inputs, with_ids=False, interpret=True)
    text_01.assert_as_good_as_rounding(found, oracle.attention(*inputs), slopes)


def test_tiles_of_packed_float32_rows_equal_the_recurrence():
    ids = np.repeat([[3, 0, 4, 5, 6, 7]], [60, 9, 190, 1, 30, 10], axis=1)
    slopes = text_01.slopes(0, _EVERY_FOURTH_HEAD)
    inputs = text_01.make_inputs(_TILED, slopes, ids, dtype=jnp.float32)
    found = contract.run("pallas_tpu", inputs, interpret=True)
    contract.assert_close(found, oracle.attention(*inputs), tolerance=1e-5)


def test_no_read_of_memory_that_holds_nothing_and_no_race():
    """The ragged last block and the scratch hold NaN until something is written there."""
    case = Case(batch=1, length=130, heads=2, key_dim=8, value_dim=5)
    ids = np.repeat([[1, 0, 2]], [50, 5, 75], axis=1)
    inputs = contract.make_inputs(case, ids)
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    found = contract.run("pallas_tpu", inputs, interpret=interpret)
    contract.assert_close(found, oracle.attention(*inputs))


def test_the_choice_by_target_and_its_reasons():
    inputs = contract.make_inputs(_TILED)
    choices = api.choices(*inputs[:5], None)
    assert choices["tpu"].name == "pallas_tpu" and not choices["tpu"].refusals
    assert choices["cpu"].name == "xla"
    assert "run on TPUs" in choices["cpu"].refusals["pallas_tpu"]


def test_a_refusal_of_a_named_choice_says_why():
    with jax.enable_x64(True), pytest.raises(Unsupported, match="float64"):
        x = jnp.ones((1, 2, 1, 8), jnp.float64)
        api.lightning_attention(x, x, x, np.zeros(1), implementation="pallas_tpu")
