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
