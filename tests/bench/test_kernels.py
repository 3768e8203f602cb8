"""Predicted times of the lightning kernels are as committed: a slower kernel fails here."""

import importlib.metadata
import json
import os
import pathlib
import re

import pytest

from hybrid_jax import cli
from hybrid_jax.bench import kernels
from tests import aot

GOLDEN = pathlib.Path(__file__).parent / "golden"
# With another compiler the schedule is another one; these are of the version that setup.cfg brings
# to the oldest supported Python.
PINNED = "0.0.42.1"

# Least fractions of the roofline's time that the project stands for, forward and backward.
REACH = {"v5e": (0.70, 0.60), "v5p": (0.70, 0.60), "v6e": (0.70, 0.60), "tpu7x": (0.55, 0.45)}

ALWAYS = ("forward", "backward", "decode")
RARELY = tuple(name for name in kernels.NAMES if name not in ALWAYS)


def golden(target: str) -> pathlib.Path:
    return GOLDEN / f"libtpu-{PINNED}-{target}.json"


def summary(report: dict) -> dict:
    """What a reader of a diff wants to see change, of each kernel of a report."""
    return {
        name: {
            "predicted_ms": entry["predicted_ms"],
            "roofline_fraction": entry["roofline_fraction"],
            "kernels": {
                kernel["name"]: {
                    "bundles_per_step": round(kernel["bundles_per_step"], 1),
                    "steps": kernel["steps"],
                    "spills_per_step": round(
                        kernel["spill_stores_per_step"] + kernel["spill_fills_per_step"], 1
                    ),
                    "bytes": kernel["read_bytes"] + kernel["written_bytes"],
                }
                for kernel in entry["program"]["kernels"]
            },
        }
        for name, entry in report.items()
        if name in kernels.NAMES
    }


@pytest.mark.aot
@pytest.mark.parametrize("target", kernels.IDEAL_MS["forward"])
@pytest.mark.parametrize(
    "names", [ALWAYS, pytest.param(RARELY, marks=pytest.mark.nightly)], ids=["always", "rarely"]
)
def test_no_kernel_is_slower_than_it_was(target, names):
    aot.with_compiler(target)
    version = importlib.metadata.version("libtpu")
    if version != PINNED:
        pytest.skip(f"the golden times are of libtpu {PINNED}; this is {version}")
    found = summary(kernels.run(target, names, note=lambda text: None))
    path = golden(target)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        kept |= found
        ordered = {name: kept[name] for name in kernels.NAMES if name in kept}
        path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    assert kept.keys() >= set(names), f"no golden times in {path.name}: UPDATE_GOLDEN=1 writes them"
    wanted = {name: kept[name] for name in names}
    slower = {
        name: (wanted[name]["predicted_ms"], entry["predicted_ms"])
        for name, entry in found.items()
        # Figures are rounded to 0.1 us; the compiler gives the same bundles every time.
        if entry["predicted_ms"] > wanted[name]["predicted_ms"]
    }
    assert not slower, f"slower on {target} (ms, before and now): {slower}"
    assert found == wanted, (
        "a kernel changed and is no slower: keep it with UPDATE_GOLDEN=1 pytest -m aot tests/bench"
    )


@pytest.mark.parametrize("target", REACH)
def test_the_committed_times_are_within_reach_of_the_roofline(target):
    kept = json.loads(golden(target).read_text(encoding="utf-8"))
    for name, least in zip(("forward", "backward"), REACH[target], strict=True):
        assert kept[name]["roofline_fraction"] >= least
    for name, least in (("grouped_forward", 0.94), ("grouped_backward", 0.87)):
        assert kept[name]["roofline_fraction"] >= least


def test_bad_input_is_told_before_anything_is_compiled(capsys, tmp_path):
    bad = (
        (["--target", "h100"], "no ideal times for h100"),
        (["--target", "v9"], "no target 'v9'"),
        (["--target", "v5p", "--kernel", "sideways"], "no kernel .*sideways"),
        (["--target", "v5p", "--json", str(tmp_path / "no" / "x.json")], "no directory"),
    )
    for options, message in bad:
        assert cli.main(["bench", "kernels", *options]) == 2
        assert re.search(message, capsys.readouterr().err)
