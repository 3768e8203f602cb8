"""The blocked matmuls keep the contract, and neither copy their output nor read idle matrices."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import blocks, xla
from pallas_kernels.grouped_matmul.cases import CASES
from tests.pallas_kernels.grouped_matmul.contract import SIZES, Contract, D, E, F, R


class TestXla(Contract):
    implementation = "xla"


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_output_is_updated_in_place():
    compiled = (
        jax.jit(lambda *args: xla.forward(*args, None))
        .lower(abstract(R, D), abstract(E, D, F), abstract(E, dtype=jnp.int32))
        .compile()
    )
    copies = [line for line in compiled.as_text().splitlines() if f"f32[{R},{F}]" in line]
    assert copies, "the output should be in the program"
    assert not [line for line in copies if " copy(" in line]


def test_a_scan_over_layers_slices_out_single_matrices_only():
    layers = 3

    def decode(x_RD, w_EDF, sizes_LE):
        def layer(x_RD, layer_and_sizes):
            index, sizes_E = layer_and_sizes
            out_RF = grouped_matmul(x_RD, w_EDF, sizes_E, group_offset=index * E)
            return x_RD + out_RF[:, :D], None

        return jax.lax.scan(layer, x_RD, (jnp.arange(layers, dtype=jnp.int32), sizes_LE))[0]

    w = abstract(layers * E, D, F)
    text = jax.jit(decode).lower(abstract(2, D), w, abstract(layers, E, dtype=jnp.int32))
    text = text.compile().as_text()
    assert f"f32[{D},{F}]" in text
    assert f"f32[{E},{D},{F}]" not in text


@pytest.mark.parametrize("name", CASES)
def test_blocks_fit_the_rows_of_a_group(name):
    case = CASES[name]
    sizes = blocks.block_sizes(case.R, case.E)
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert sizes[0] <= case.R
    # The last block computes up to its size less one rows in vain, once a group.
    assert sizes[-1] == 1 or sizes[-1] * 8 <= case.R // case.E


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 512])
def test_no_block_but_the_last_covers_all_rows(rows):
    """XLA would move it out of its loop and compute it for every group."""
    assert all(size < rows for size in blocks.block_sizes(rows, E)[:-1])


def test_groups_lists_those_with_rows():
    groups = blocks.find_groups(jnp.asarray(SIZES["rows_past_the_sum"], jnp.int32), 560)
    assert groups.num_active == 3
    assert groups.active_E[:3].tolist() == [0, 2, 3]
    assert groups.end_E.tolist() == [33, 33, 550, 560]
