"""From what the compiler said to verdicts: figures checked by hand."""

import pytest

from hybrid_jax.config import presets
from hybrid_jax.plan import clocks, compile, defaults, hlo, kernels, plot, report, table
from hybrid_jax.plan.request import Request
from hybrid_jax.targets import CHIPS
from sharding import mesh as meshes
from sharding import rules

GIB = 2**30
REQUEST = Request(
    preset="minimax-text-01", target="v5p:8x8x8", step="train", mesh="fsdp=64,expert=8",
    rules="expert", batch=512, seq=8192,
)  # fmt: skip
# Half of what 512 chips can do in ten seconds.
FLOPS = 512 * 459e12 * 5
FOUND = {
    "devices": 512, "mesh": {}, "tokens": 512 * 8192, "model_flops": FLOPS, "lower_seconds": 1.0,
    "compile_seconds": 60.0, "host_peak_bytes": 4 * GIB, "seconds": 10.0, "unknown_loops": 0,
    "memory_traffic_bytes": 1e12,
    "memory": {"arguments": 8 * GIB, "outputs": 0, "temporaries": 60 * GIB, "code": 0},
    "work": [
        {"kind": "matrix products", "source": "compiler", "again": False, "seconds": 5.5},
        {"kind": "kernel splash", "source": "schedule", "again": False, "seconds": 0.5},
        {"kind": "matrix products", "source": "compiler", "again": True, "seconds": 1.5},
        {"kind": "elementwise and copies", "source": "model", "again": False, "seconds": 1.5},
    ],
    "traffic": [
        {"kind": "all-gather", "axes": ["fsdp"], "count": 80, "bytes": 3e9, "seconds": 2.0,
         "exposed": 0.75},
        {"kind": "all-to-all", "axes": ["expert"], "count": 80, "bytes": 1e9, "seconds": 1.0,
         "exposed": 0.25},
    ],
}  # fmt: skip


def test_a_step_is_divided_into_causes_that_add_up():
    plan = report.make(REQUEST, FOUND, price=4.2)
    assert plan["predicted_mfu"] == pytest.approx(0.5)
    shares = {each["cause"]: each["share"] for each in plan["causes"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["the model's FLOPs at peak rate"] == pytest.approx(0.5)
    assert shares["products and kernels below peak rate"] == pytest.approx(0.1)
    assert shares["recomputation"] == pytest.approx(0.15)
    assert shares["waiting for fsdp"] == pytest.approx(0.075)
    assert plan["bound"] == "the model's FLOPs at peak rate"
    assert plan["collective_bytes"] == {"fsdp": 3e9, "expert": 1e9}
    # 512 chips for 4.2 dollars an hour, 419,430 tokens a second.
    assert plan["dollars_per_billion_tokens"] == pytest.approx(1424, rel=1e-3)
    assert plan["time_sources"]["compiler"] == pytest.approx(7 / 9)


def test_what_fits_leaves_the_runtime_its_share():
    assert report.make(REQUEST, FOUND)["fits"]
    most = 0.92 * CHIPS["v5p"].hbm_bytes
    full = FOUND | {"memory": FOUND["memory"] | {"temporaries": int(most) - 8 * GIB + 1}}
    assert not report.make(REQUEST, full)["fits"]
    refused = {name: FOUND[name] for name in FOUND if name not in ("memory", "seconds", "work")}
    told = report.make(REQUEST, refused | {"refused_bytes": 120 * GIB})
    assert (told["fits"], told["predicted_mfu"], told["step_seconds"]) == (False, None, None)
    assert "**Does not fit**: 31.7 GiB a device too much" in "\n".join(table.lines(told))


def test_a_chip_of_two_devices_is_one_chip():
    request = Request(**{**vars(REQUEST), "target": "tpu7x:4x4x4"})
    plan = report.make(request, FOUND | {"devices": 128})
    assert plan["chips"] == 64
    assert plan["budget_bytes_per_device"] == int(0.92 * CHIPS["tpu7x"].hbm_bytes / 2)


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 31.25G hbm."
    )
    assert compile._memory_asked_for(message) == int(40.5 * GIB)
    message = "the total memory required for HLO temporaries (1.5T) exceeds available HBM (15.75G)."
    assert compile._memory_asked_for(message) == 1.5 * 1024 * GIB
    assert compile._memory_asked_for("RESOURCE_EXHAUSTED: scoped vmem") is None


def test_tables_and_pictures_show_every_plan(tmp_path):
    plan = report.make(REQUEST, FOUND)
    text = "\n".join(table.lines(plan))
    assert "**Fits**, with 20.3 GiB a device to spare" in text and "MFU 50.0%" in text
    ranking = table.search_lines([plan], [("tensor=3", "does not divide")])
    assert ranking[2].startswith("| 1 | fsdp=64,expert=8 |") and "does not divide" in ranking[-1]
    plot.draw([plan, plan], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw([], tmp_path / "none.png")


@pytest.mark.parametrize("preset", ["minimax-text-01", "minimax-m2", "quickstart"])
@pytest.mark.parametrize("step", ["train", "prefill", "decode"])
@pytest.mark.parametrize("devices", [1, 8, 256, 512])
@pytest.mark.parametrize("seq", [8192, 1 << 20])
def test_defaults_multiply_out_and_use_every_axis(preset, step, devices, seq):
    config = presets.get(preset)
    layout = defaults.default_layout(config, devices, step, seq)
    shape = meshes.parse(layout.mesh, devices)
    used = {axis for axis, size in shape.sizes.items() if size > 1}
    assert used <= rules.get(layout.rules).axes
    assert layout.batch >= 1


@pytest.mark.parametrize(
    "kernel, operands, results, fill, expected",
    [
        ("lightning_attention_forward", ["bf16[1,64,8,8,128]"] * 3, "bf16[1,64,8,8,128]", 1, 2**19),
        (
            "splash_mha_fwd_x",
            ["s32[1,8,8]", "bf16[64,8192,128]"],
            "f32[1]",
            1,
            64 * 8192**2 * 9 / 16,
        ),
        # Two blocks of a ring, which hides nothing.
        ("splash_mha_dq_x", ["bf16[2,64,512,128]", "s32[2,8,512]"], "f32[1]", 1, 128 * 512**2),
        ("pack_rows", ["bf16[80,512]"], "u32[80,8,128]", 1, 80 * 8 * 128),
        ("grouped_swiglu_gate_up", ["bf16[80,6]", "bf16[4,6,10]"], "bf16[80,5]", 0.5, 40 * 60),
        ("grouped_swiglu_dx", ["bf16[2,80,5]", "bf16[4,6,10]"], "bf16[80,6]", 1, 80 * 60),
        ("grouped_swiglu_ddown", ["bf16[80,5]", "bf16[1,80,6]"], "bf16[4,5,6]", 1, 80 * 30),
    ],
)
def test_work_of_kernels_is_counted_from_their_shapes(kernel, operands, results, fill, expected):
    dims = [hlo.dims(shape) for shape in operands]
    assert kernels.units(kernel, dims, hlo.all_dims(results), fill) == expected


def test_no_rows_and_no_tokens_are_refused_and_not_defaulted():
    for wrong in ({"batch": 0}, {"seq": 0}):
        with pytest.raises(ValueError, match="whole number >= 1"):
            Request(**{**vars(REQUEST), **wrong})


def test_a_kernel_takes_its_time_from_the_table_and_never_from_what_it_declares():
    text = """
ENTRY %main (q: bf16[1,8192,8,8,128]) -> bf16[1,8192,8,8,128] {
  %q = bf16[1,8192,8,8,128]{4,3,2,1,0} parameter(0)
  ROOT %lightning_attention_forward.7 = bf16[1,8192,8,8,128]{4,3,2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1"}}
}
"""  # noqa: E501
    program = hlo.read(text)
    clock = clocks.TpuClock(program, CHIPS["v5p"], 1.0)
    work = clock("main", program.computations["main"][1])
    assert work.source == "schedule" and work.kind == "kernel lightning_attention_forward"
    assert work.seconds == pytest.approx(
        kernels.rates()["v5p"]["lightning_attention_forward"] * 8192 * 64 * 128
    )
