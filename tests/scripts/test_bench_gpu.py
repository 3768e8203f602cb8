"""bench_gpu as far as it goes without a GPU: its plan, its programs, its checks and its report."""

import json

import jax
import numpy as np
import pytest

from scripts import bench_gpu, bench_gpu_checks, bench_gpu_ours


def test_a_dry_run_prints_the_plan_and_lowers_our_kernel(capsys):
    only = [f"--only={mode}" for mode in ("forward+backward", "packed", "decode")]
    assert bench_gpu.main(["--dry-run", "--quick", *only]) == 0
    text = capsys.readouterr().out
    assert "h200 ms" in text and "7 programs hold our kernel" in text


def test_the_reference_shape_takes_the_time_of_its_bytes():
    """2.56 ms forward on an H100: 4 tensors of 2.147 GB and two states at 3.35 TB/s."""
    line = bench_gpu.Line("forward", 1, 131072, 64)
    assert line.bytes == 4 * 2 * 131072 * 64 * 128 + 2 * 4 * 64 * 128 * 128
    chip = bench_gpu.ceiling("NVIDIA H100 80GB HBM3")
    assert round(line.bytes / chip.hbm_bytes_per_second * 1e3, 2) == 2.57


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The whole run with XLA in the kernel's place."""
    monkeypatch.setattr(bench_gpu_ours, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(bench_gpu_ours, "_SECONDS", 1e-3)


def test_every_mode_is_checked_timed_and_reported(on_a_cpu, monkeypatch, tmp_path, capsys):
    lines = [bench_gpu.Line(mode, 1, 96, 2) for mode in ("forward", "forward+backward")]
    lines += [bench_gpu.Line("packed", 1, 96, 2, 3), bench_gpu.Line("decode", 2, 1, 2)]
    monkeypatch.setattr(bench_gpu, "plan", lambda modes, quick: lines)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench_gpu_checks, "contract", lambda: None)
    assert bench_gpu.main(["--json", str(tmp_path / "out.json"), "--rounds", "3"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [line["mode"] for line in report["lines"]] == [line.mode for line in lines]
    for line in report["lines"]:
        assert len(line["ours"]["ms_all"]) == 3
        assert line["ours"]["gb_per_s"] == pytest.approx(line["bytes"] / line["ours"]["ms"] / 1e6)


def test_a_wrong_result_ends_the_run():
    right = np.ones(5)
    bench_gpu_checks.compare("right", right * 1.001, right)
    with pytest.raises(SystemExit, match="WRONG: scale"):
        bench_gpu_checks.compare("scale", right * 1.01, right)
    with pytest.raises(SystemExit, match="WRONG: nan"):
        bench_gpu_checks.compare("nan", right * np.nan, right)


def test_the_contract_is_run_against_the_recurrence(on_a_cpu, monkeypatch):
    monkeypatch.setattr(bench_gpu_checks, "_HEAD_SIZES", ((8, 4),))
    bench_gpu_checks.contract()


def test_contestants_take_turns_in_going_first():
    order = []
    contestants = {name: lambda name=name: order.append(name) or 1.0 for name in ("ours", "fla")}
    bench_gpu.measure(bench_gpu.Line("decode", 1, 1, 1), contestants, 3)
    assert order == ["ours", "fla", "fla", "ours", "ours", "fla"]


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"NVIDIA GPU.*--dry-run"):
        bench_gpu.main([])
