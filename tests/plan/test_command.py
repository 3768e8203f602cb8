"""`hybrid-jax plan` with the real compilers, on a small model."""

import json

import pytest

from hybrid_jax import cli
from tests import aot

SMALL = ("--preset", "nano", "--seq", "256")


def plan(*options: str) -> int:
    return cli.main(["plan", *SMALL, *options])


@pytest.mark.aot
def test_a_step_for_a_pod_is_planned_and_drawn(tmp_path, capsys):
    aot.with_compiler("v5p")
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ("--target", "v5p:2x2x2", "--mesh", "fsdp=4,expert=2", "--batch", "8")
    assert plan(*options, "--price", "4.2", "--json", str(out), "--png", str(png)) == 0
    found = json.loads(out.read_text())
    assert found["fits"] and found["chips"] == 8 and found["time_source"] == "compiler"
    assert 0 < found["predicted_mfu"] < 1 and found["compile_seconds"] > 0
    assert found["tokens"] / found["step_seconds"] == pytest.approx(found["tokens_per_second"])
    assert {"fsdp", "expert"} <= set("+".join(found["collective_bytes"]).split("+"))
    assert sum(each["share"] for each in found["causes"]) == pytest.approx(1)
    assert found["dollars_per_billion_tokens"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "**Fits**" in printed and "8 chips (8 devices) as fsdp=4,expert=2" in printed


@pytest.mark.aot
def test_what_does_not_fit_is_said_with_exit_code_1(capsys):
    aot.with_compiler("v5e")
    assert plan("--target", "v5e:2x2", "--mesh", "fsdp=4", "--batch", "131072") == 1
    assert "**Does not fit**" in capsys.readouterr().out


@pytest.mark.aot
def test_gpus_get_a_roofline_that_says_so(capsys):
    aot.with_compiler("h200")
    assert plan("--target", "h200:8", "--step", "decode", "--batch", "8") == 0
    assert "Every time is a roofline model's" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.aot
def test_a_search_ranks_what_compiles_and_names_what_does_not(tmp_path, capsys):
    aot.with_compiler("v5p")
    out = tmp_path / "plans.json"
    options = ("--target", "v5p:2x2x1", "--mesh", "fsdp=4", "--batch", "4", "--json", str(out))
    assert plan(*options, "--search") == 0
    plans = json.loads(out.read_text())
    rates = [each["predicted_mfu"] for each in plans if each["fits"]]
    assert len(rates) > 3 and rates == sorted(rates, reverse=True)
    assert "| rank | mesh |" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "v9:2x2"), "no target 'v9:2x2'"),
        (("--target", "v5p:2x2x1", "--mesh", "fsdp=3"), "there are 4"),
        (("--target", "v5p:2x2x1", "--batch", "3"), "do not divide by expert=4"),
        (("--target", "v5p:2x2x1", "--mesh", "tensor=4", "--rules", "fsdp"), "split nothing over"),
        (("--target", "v5p:2x2x1", "--batch", "0"), "batch must be a whole number"),
        (("--target", "v5p:2x2x1", "--price", "-1"), "must be > 0"),
        (("--target", "v5p:2x2x1", "--capacity", "0"), "multiple of the even share"),
        (("--target", "v5p:2x2x1", "--json", "/nowhere/plan.json"), "there is no directory"),
    ],
)
def test_bad_input_is_one_sentence(options, message, capsys):
    aot.with_compiler("v5p")
    assert plan(*options) == 2
    assert message in capsys.readouterr().err
