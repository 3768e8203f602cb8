"""The walk through a program: what hides behind what, and how often loops count."""

import pytest

from hybrid_jax.plan import collectives, hlo, timeline
from hybrid_jax.plan.network import Network
from hybrid_jax.targets import CHIPS
from tests.plan.test_network import torus

GB = 10**9
MESH = {"fsdp": 8, "expert": 8, "tensor": 8}
# Over a ring of 8 on v5p: 7 eighths of 2 GB over 200 GB/s.
GATHER = 2 * 7 / 8 / 200

PROGRAM = """HloModule jit_step, is_scheduled=true

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %start = (bf16[125000000]{0}, bf16[1000000000]{0}) all-gather-start(%w), replica_groups={GROUP}
  %w = bf16[125000000]{0} parameter(1)
  %work = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, metadata={AGAIN}
  %done = bf16[1000000000]{0} all-gather-done(%start)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%x, %work)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} constant(70)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%sparse (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0), backend_config={"several": [
"lines"
]}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %before = f32[8]{0:T(128)} fusion(%a), kind=kOutput, calls=%fused
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%before), condition=%condition, body=%body
  %sum = bf16[1000000000]{0} all-reduce(%big), replica_groups=[64,8]<=[8,64]T(1,0), to_apply=%add
  %big = bf16[1000000000]{0} parameter(1)
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
""".replace("{GROUP}", "{{0,1,2,3,4,5,6,7}}").replace("AGAIN", 'op_name="rematted_computation/mul"')


def walk(work_seconds):
    program = hlo.read(PROGRAM)

    def clock(_, instruction):
        return timeline.Work(work_seconds, "matrix products", "compiler")

    network = Network(CHIPS["v5p"], torus(8, 8, 8))
    return timeline.Walk(program, clock, network, MESH).entry()


def test_loops_count_as_often_as_they_run():
    found = walk(1.0)
    assert hlo.read(PROGRAM).trips(hlo.read(PROGRAM).defined["main"]["loop"]) == 70
    assert found.work["matrix products", "compiler", True] == 70
    assert found.work["matrix products", "compiler", False] == 1
    assert found.unknown_loops == 0


def test_a_loop_that_depends_on_data_goes_through_all_that_it_slices():
    text = PROGRAM.replace("constant(70)", "parameter(1)").replace(
        "  ROOT %t = (s32[]", "  %k = bf16[80,64,8]{2,1,0} parameter(2)\n"
        "  %block = bf16[1,16,8]{2,1,0} dynamic-slice(%k), dynamic_slice_sizes={1,16,8}\n"
        "  ROOT %t = (s32[]",
    )  # fmt: skip
    program = hlo.read(text)
    loop = program.defined["main"]["loop"]
    assert program.trips(loop) is None and program.pieces(loop) == 4


def test_a_collective_hides_behind_the_work_between_its_start_and_its_end():
    gathers = walk(GATHER / 4).traffic["all-gather", ("tensor",)]
    assert gathers.count == 70
    assert gathers.bytes == 70 * 2 * GB
    assert gathers.seconds == pytest.approx(70 * GATHER)
    assert gathers.exposed == pytest.approx(70 * GATHER * 3 / 4)
    assert walk(GATHER * 2).traffic["all-gather", ("tensor",)].exposed == 0


def test_collectives_at_the_same_time_share_their_links():
    links = timeline.Links()
    links.begin("long", 0.0, 10.0, (0, 1))
    links.begin("beside", 0.0, 3.0, (2,))
    links.begin("short", 4.0, 1.0, (0,))
    assert links.end("beside") == 3
    assert links.end("short") == pytest.approx(6), "half of the links for two seconds"
    assert links.end("long") == pytest.approx(11), "all the work, one after the other"
    links.begin("later", 20.0, 2.0, (0,))
    assert links.end("later") == pytest.approx(22)


def test_one_without_a_start_is_waited_for():
    found = walk(1.0)
    sums = found.traffic["all-reduce", ("fsdp",)]
    assert sums.exposed == pytest.approx(sums.seconds) == pytest.approx(2 * GATHER)
    assert found.seconds == pytest.approx(71 + 2 * GATHER)


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,8},{1,9}}", (0, 8)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1':(1)4}", (0, 2, 4, 6)),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,2,2]T(0,2,1)) {'axis_0'}",
            (0, 1, 4, 5),
        ),
        ("source_target_pairs={{0,2},{2,4},{4,0}}", (0, 2, 4)),
        ("channel_id=1", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_every_way_to_write_groups_is_read(text, group):
    instruction = hlo.Instruction("x", "f32[8]", "all-reduce", (), text)
    assert collectives._group(instruction, 8) == group


def test_groups_are_named_by_the_axes_they_span():
    mesh = {"data": 1, "fsdp": 4, "expert": 2}
    assert collectives.axes((0, 2, 4, 6), mesh) == ("fsdp",)
    assert collectives.axes((0, 1), mesh) == ("expert",)
    assert collectives.axes(range(8), mesh) == ("fsdp", "expert")


def test_both_ways_to_write_branches_are_read():
    by_number = "branch_computations={%one, %two}"
    by_truth = "true_computation=%one, false_computation=%two"
    for text in (by_number, by_truth):
        assert hlo.Instruction("x", "f32[]", "conditional", (), text).called == ("one", "two")


def test_bytes_of_types():
    assert hlo.shape_bytes("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert hlo.shape_bytes("(f32[4]{0}, /*index=1*/s8[5]{0}, pred[])") == 22
    assert hlo.shape_bytes("s4[3]") == 2
