"""The TPU kernels, interpreted on the CPU, keep the contract, however they are cut into blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hybrid_jax import targets
from pallas_kernels import grouped_matmul
from pallas_kernels.errors import Unsupported
from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul.pallas_tpu import sizes, visits
from tests.pallas_kernels.grouped_matmul import contract, oracle

KINDS = list(sizes.BY_DEVICE_KIND)
# The experts of Text-01 and M2: D, F.
WIDTHS = [(6144, 9216), (3072, 1536)]


class TestPallasTpu(contract.Contract):
    """Whole matrices in one block, and tiles of 128 or 256 rows."""

    implementation = "pallas_tpu"
    interpret = True


def test_blocks_of_columns_and_depth_with_memory_that_holds_nan(monkeypatch):
    """Borders within a tile and between tiles, and no number is read that nobody wrote."""
    R, E, D, F, group_sizes = 400, 3, 256, 384, [130, 0, 170]
    tiny = sizes.Generation(
        vmem_limit=sizes._SPILLS + 5 * 2**18, cores=1, chunk=128, band=128, unit=128
    )
    monkeypatch.setattr(sizes, "generation", lambda: tiny)
    blocks = sizes.row_tiles(R, D, F, 4, sizes.Blocks(1, 1, 1, 1))
    assert (blocks.rows, blocks.depth, blocks.columns) == (384, 128, 128)
    rng = np.random.default_rng(0)
    shapes = ((R, D), (E, D, F), (R, F))
    x, w, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    past_R1 = (np.arange(R) >= sum(group_sizes))[:, None]
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    found = contract.out_and_gradients(
        jnp.where(past_R1, jnp.nan, x), w, jnp.int32(group_sizes),
        jnp.where(past_R1, jnp.nan, dout), "pallas_tpu", interpret,
    )  # fmt: skip
    expected = (
        oracle.grouped_matmul(x, w, group_sizes), *oracle.gradients(x, w, group_sizes, dout)
    )  # fmt: skip
    for ours, exact in zip(found, expected, strict=True):
        # float32 sums of up to 384 products.
        np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("group_sizes", [[0, 0, 0], [300, 0, 212], [0, 127, 1], [256, 0, 100]])
def test_visits_cover_every_row_of_a_group_once(group_sizes):
    R, tile = 600, 128
    ends = np.cumsum(group_sizes)
    wanted = [
        (t, g)
        for g, (size, end) in enumerate(zip(group_sizes, ends, strict=True))
        for t in range((end - size) // tile, -(-end // tile))
        if size
    ]
    tiles = -(-R // tile)
    empty = [t for t in range(tiles) if t * tile >= ends[-1]]

    def pairs(order):
        return list(zip(order.tile_V.tolist(), order.group_V.tolist()))[: int(order.num)]

    rows = visits.of_rows(jnp.int32(group_sizes), R, tile, None, past_the_sum=True)
    assert pairs(rows)[: len(wanted)] == wanted
    assert [t for t, _ in pairs(rows)[len(wanted) :]] == empty
    some = visits.of_rows(jnp.int32(group_sizes), R, tile, None, past_the_sum=False)
    assert int(some.num) == max(len(wanted), 1)
    groups = visits.of_groups(jnp.int32(group_sizes), R, tile)
    assert [pair for pair in pairs(groups) if group_sizes[pair[1]]] == wanted
    assert {g for _, g in pairs(groups)} == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, hidden", WIDTHS)
def test_matrices_stay_where_memory_allows_and_cores_share_evenly(kind, width, hidden, monkeypatch):
    chip = sizes.BY_DEVICE_KIND[kind]
    monkeypatch.setattr(sizes, "generation", lambda: chip)
    # Gate and up; down; dx of both parts.
    for depth, columns, blocks in (
        (width, hidden, sizes.Blocks(1, 2, 2, 3)),
        (hidden, width, sizes.Blocks(1, 1, 1, 1)),
        (hidden, width, sizes.Blocks(2, 2, 1, 1)),
    ):
        tiles = sizes.row_tiles(16384, depth, columns, 2, blocks)
        assert depth % tiles.depth == tiles.depth % tiles.chunk == columns % tiles.columns == 0
        assert columns // tiles.columns % chip.cores == 0
        # Only v4 has no room for a block of columns of a whole matrix of Text-01.
        assert tiles.depth == depth or kind == "TPU v4"
    tiles = sizes.matrix_tiles(16384, width, hidden, 2)
    assert width % tiles.depth == hidden % tiles.columns == tiles.depth % tiles.band == 0
    assert (width // tiles.depth) * (hidden // tiles.columns) % chip.cores == 0


def test_the_generation_is_that_of_the_mesh():
    device = jax.sharding.AbstractDevice("TPU7x", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    assert sizes.generation() == sizes.BY_DEVICE_KIND["TPU v4"]
    with jax.sharding.use_abstract_mesh(mesh):
        assert sizes.generation() == sizes.BY_DEVICE_KIND["TPU7x"]
    tpus = {chip.device_kind for chip in targets.CHIPS.values() if chip.platform == "tpu"}
    assert tpus == set(KINDS)


def test_under_vmap_each_row_of_sizes_is_its_own_call():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 128, 8), (3, 8, 12)))
    group_sizes = jnp.int32([[100, 0, 28], [7, 60, 49]])

    def multiply(x, group_sizes, implementation, interpret):
        return grouped_matmul(x, w, group_sizes, implementation=implementation, interpret=interpret)

    found = jax.vmap(lambda *call: multiply(*call, "pallas_tpu", True))(x, group_sizes)
    expected = jax.vmap(lambda *call: multiply(*call, "reference", False))(x, group_sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"D": 192}, "need widths of a multiple of 128, got 192 and 256"),
        ({"R": 100}, "multiply 128 rows at once, got 100"),
    ],
)
def test_what_they_cannot_take_goes_to_ragged_dot_with_the_reason(change, reason):
    call = {"R": 256, "D": 128, "F": 256} | change
    x, w = jnp.zeros((call["R"], call["D"])), jnp.zeros((4, call["D"], call["F"]))
    choices = api.choices(x, w, jnp.zeros(4, jnp.int32))
    assert choices["tpu"].name == "ragged_dot"
    assert reason in choices["tpu"].refusals["pallas_tpu"]
    with pytest.raises(Unsupported, match=reason):
        grouped_matmul(x, w, jnp.zeros(4, jnp.int32), implementation="pallas_tpu")


def test_only_the_kernels_can_be_interpreted():
    with pytest.raises(ValueError, match="interpret its implementation 'pallas_tpu' alone"):
        grouped_matmul(
            jnp.zeros((8, 8)), jnp.zeros((1, 8, 8)), jnp.int32([8]),
            implementation="xla", interpret=True,
        )  # fmt: skip
