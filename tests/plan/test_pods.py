"""The real models on real pods, by their own compilers: what docs/scaling.md says of them."""

import pytest

from hybrid_jax.plan import run
from tests import aot

pytestmark = [pytest.mark.nightly, pytest.mark.aot]
GB = 10**9


def exposed(report, kind: str) -> float:
    """Share of the time of such collectives that is waited for."""
    found = [each for each in report["traffic"] if each["kind"] == kind]
    return sum(each["exposed"] for each in found) / sum(each["seconds"] for each in found)


def test_text_01_trains_on_512_v5p():
    aot.with_compiler("v5p")
    request = run.request_for(
        "minimax-text-01", "v5p:8x8x8", mesh="fsdp=64,expert=8", rules="expert",
        remat="save_collectives", capacity=1.25,
    )  # fmt: skip
    report = run.plan(request)
    assert report["fits"] and report["predicted_mfu"] >= 0.5
    assert report["host_peak_bytes"] < 8 * GB
    assert exposed(report, "all-to-all") < 0.5
    # Nearly all of the time is the compiler's or a schedule's.
    assert report["time_sources"].get("model", 0.0) < 0.05


MILLION = 1 << 20
TRAINED = {
    "text-01 on v6e": dict(
        preset="minimax-text-01", target="v6e:16x16", mesh="fsdp=16,expert=8,sequence=2", batch=128,
        remat="full",
    ),
    "text-01 on v6e, half moments": dict(
        preset="minimax-text-01", target="v6e:16x16", mesh="fsdp=16,expert=16", rules="expert",
        remat="full", moments="bfloat16", token_groups=2,
    ),
    "a million tokens on v5p": dict(
        preset="minimax-text-01", target="v5p:8x8x8", seq=MILLION, remat="save_mixer"
    ),
    "a million tokens on v6e": dict(
        preset="minimax-text-01", target="v6e:16x16", seq=MILLION, mesh="expert=8,sequence=32",
        rules="long_rows", batch=1, remat="full",
    ),
    "a policy on v5p": dict(
        preset="minimax-text-01", target="v5p:8x8x8", step="rl", mesh="fsdp=64,expert=8",
        rules="expert", remat="save_collectives",
    ),
    "m2 on v5p": dict(preset="minimax-m2", target="v5p:4x8x8", remat="save_collectives"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_a_pod_trains(name):
    options = TRAINED[name] | {"capacity": 1.25}
    aot.with_compiler(options["target"].partition(":")[0])
    report = run.plan(run.request_for(**options))
    assert report["fits"] and report["host_peak_bytes"] < 8 * GB
    assert exposed(report, "all-to-all") < 0.5


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("prefill", {"seq": 1 << 20, "batch": 1}),
        ("decode", {"seq": 65_536, "batch": 32}),
    ],
)
def test_text_01_is_served_by_8_h200(step, options):
    aot.with_compiler("h200")
    report = run.plan(run.request_for("minimax-text-01", "h200:8", step, **options))
    assert report["fits"] and report["time_source"] == "model"
