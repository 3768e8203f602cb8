"""A schedule is read as the kernel runs: loops, branches and copies as often as they happen."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybrid_jax.targets import schedule
from hybrid_jax.targets.schedule import bundles, execute, flags
from tests import aot

# Three passes of a loop that starts at bundle 2; in its last pass a copy of 64 KiB. The last two
# bundles of the loop stand in the slots of its branch.
LOOP = """
LB: loop body

     0   :  { %s1_s0 = smov 0 /* a comment /* in a comment */ } is no end */ }
   0x1   :  { %9 = sst [smem:[#allocation3_spill]] %s1_s0 } /* Start region 7 */
   0x2 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0  ;;  %v5_v0 = vld [vmem:[%s1_s0]] } /* Start region 8 */
   0x3   : > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %s8_s2 = sld [smem:[#allocation3_spill]] }
   0x4   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s0, 3 /* loop exit test */ }
   0x5   : > { %p6_p1 = pand %p4_p0, %p4_p0  ;;  %7 = sbr.rel (!%p4_p0) target = $region8 }
   0x6   : > { %10 = dma.hbm_to_vmem (%p6_p1), /*hbm=*/%s1_s0, /*size_in_granules=*/2048, %s8_s2 }
   0x7   :  {}
   0x8   :  { %11 = dma.done.wait [#allocation6], 16 }
"""


def test_a_loop_is_run_as_often_as_its_test_says():
    run = execute.run(bundles.read(LOOP), core=None)
    assert run.counts == [1, 1, 3, 3, 3, 3, 3, 3, 1]
    assert run.steps == 3
    assert (run.read_bytes, run.written_bytes, run.dmas) == (65536, 0, 1)
    assert run.unresolved == 0


def test_a_branch_on_data_is_not_taken_and_is_reported():
    text = LOOP.replace("%s3_s0, 3 /*", "%s77_s9, 3 /*")
    run = execute.run(bundles.read(text), core=None)
    assert run.counts == [1] * 9
    # The branch, and the copy under the same condition.
    assert run.unresolved == 2


def test_another_compilers_text_is_refused():
    with pytest.raises(ValueError, match="No bundle found"):
        bundles.read("ENTRY %main () -> f32[] {\n}")
    with pytest.raises(ValueError, match="0x3 follows bundle 0x1"):
        bundles.read(LOOP.replace("   0x2 LB: >", "   xxx :"))
    assert "flags.py" in flags.refusal("x\nERROR: Unknown command line flag 'xla_jf_dump_to'\n")


def test_schedules_are_read_for_tpus_only():
    with pytest.raises(ValueError, match="h100 is none"):
        schedule.schedule_of(kernel, "h100")


TILES, STEPS, WIDTH = 64, 16, 512


def kernel(trips: int = TILES, every: int = 2):
    """Doubles 2 x STEPS windows of [8 TILES, WIDTH], `trips` tiles of each in an inner loop; in
    every few steps it also adds a row that all steps share."""

    def body(x_ref, row_ref, out_ref):
        @pl.loop(0, trips)
        def _(tile):
            here = pl.ds(tile * 8, 8)
            out_ref[here] = x_ref[here] * 2.0

        @pl.when(pl.program_id(1) % every == 0)
        def _():
            out_ref[:8] += row_ref[...]

    def double(x, row):
        window = pl.BlockSpec((8 * TILES, WIDTH), lambda i, j: (i * STEPS + j, 0))
        return pl.pallas_call(
            body,
            grid=(2, STEPS),
            in_specs=[window, pl.BlockSpec((8, WIDTH), lambda i, j: (0, 0))],
            out_specs=window,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name="double",
        )(x, row)

    x = jax.ShapeDtypeStruct((2 * STEPS * 8 * TILES, WIDTH), jnp.float32)
    return double, (x, jax.ShapeDtypeStruct((8, WIDTH), jnp.float32))


def only(target: str, **arguments) -> schedule.KernelSchedule:
    aot.with_compiler(target)
    report = schedule.schedule_of(kernel, target, **arguments)
    (found,) = report.kernels
    assert found.unresolved == 0
    return found


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "cores", "row_fetches"),
    # A shared row is fetched once by each core; for tpu7x XLA puts it into VMEM before the kernel.
    [("v5p", 2, 2), ("v5e", 1, 1), ("tpu7x", 1, 0)],
)
def test_bytes_are_the_windows_times_the_grid(target, cores, row_fetches):
    found = only(target)
    size = 2 * STEPS * 8 * TILES * WIDTH * 4
    assert found.read_bytes == size + row_fetches * 8 * WIDTH * 4
    assert found.written_bytes == size
    # The parallel dim is halved between two cores.
    assert found.steps == 2 * STEPS // cores
    assert found.hbm_ms == pytest.approx(
        (found.read_bytes + size) / {"v5p": 2.46e9, "v5e": 0.82e9, "tpu7x": 3.7e9}[target]
    )


@pytest.mark.aot
def test_trips_of_an_inner_loop_are_counted():
    cycles = [only("v6e", trips=trips).cycles for trips in (16, 32, 64)]
    once, twice = cycles[1] - cycles[0], cycles[2] - cycles[1]
    # 16 more trips in each of 32 steps, of the same code; then 32 more.
    assert once % (16 * 2 * STEPS) == 0 and once > 0
    assert twice == 2 * once


@pytest.mark.aot
def test_a_region_counts_in_the_steps_that_enter_it():
    cycles = {every: only("v6e", every=every).cycles for every in (2, 4, 8)}
    # It is entered in a half, a quarter, an eighth of the steps.
    assert 2 * (cycles[2] - cycles[8]) == 3 * (cycles[2] - cycles[4]) > 0
