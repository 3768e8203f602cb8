"""`hybrid-jax shard` counts bytes without allocating, and refuses what cannot be split."""

import json

import pytest

from hybrid_jax import cli


def test_text_01_on_a_pod(tmp_path, capsys):
    out = tmp_path / "shard.json"
    options = ["--preset", "minimax-text-01", "--mesh", "fsdp=64,expert=8", "--json", str(out)]
    assert cli.main(["shard", *options]) == 0
    text = capsys.readouterr().out
    assert "stack.runs.0.ffn.gate_up" in text and "experts:expert model:fsdp" in text
    report = json.loads(out.read_text())
    # bfloat16 but for the routers, 456,089,655,296 parameters in all.
    routers = 80 * 6144 * 32
    assert report["bytes"] == 2 * 456_089_655_296 + 2 * routers
    # Whole over `expert` are the routers and ten layers' keys and values, whole over `fsdp` the
    # norms inside lightning layers; nothing else of any size is.
    over_fsdp = 10 * 2 * 6144 * 8 * 128 * 2 + 80 * 6144 * 32 * 4
    norms = 70 * 64 * 128 * 2
    expected = (report["bytes"] - over_fsdp - norms) / 512 + over_fsdp / 64 + norms / 8
    # Vectors of the residual stream, not counted here, are less than a ten-thousandth.
    assert report["bytes_per_device"] == pytest.approx(expected, rel=1e-4)
    gate_up = next(p for p in report["parameters"] if p["name"] == "stack.runs.0.ffn.gate_up")
    assert gate_up["placement"] == [[], [], ["expert"], ["fsdp"], [], []]
    assert gate_up["bytes_per_device"] == gate_up["bytes"] // 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "minimax-m2", "--mesh", "tensor=16"), "kv_heads of 8 does not divide by"),
        (("--preset", "minimax-m2", "--mesh", "tenor=16"), "Did you mean 'tensor'"),
        (("--preset", "minimax-m3", "--mesh", "fsdp=2"), "minimax-m3"),
        (("--preset", "quickstart", "--mesh", "fsdp=2", "--rules", "best"), "no rules 'best'"),
    ],
)
def test_bad_input(options, message, capsys):
    assert cli.main(["shard", *options]) == 2
    assert message in capsys.readouterr().err
