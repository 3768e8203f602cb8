"""From what the compiler said to what people ask: does it fit, how fast, what does it wait for?"""

import dataclasses

from hybrid_jax import targets
from hybrid_jax.plan.request import Request

FITS = 0.92
"""Share of a device's memory that a program may take: the rest is the runtime's, and headroom."""

DEFINITIONS = {
    "mfu": "(6 x active parameters without the embedding table + attention FLOPs, causal half) x "
    "tokens / (time x chips x bf16 peak); recomputation is not counted; a third of it for prefill "
    "and decode, which have no backward pass",
    "fits": f"peak bytes <= {FITS} of the device's memory",
    "peak": "arguments + temporaries + outputs that are not written over arguments + code; a TPU's "
    "temporaries are what its compiler adds at the fullest moment",
    "exposed": "time of collectives that the program schedules no work beside",
    "hbm_bytes": "operands and results of every operation outside kernels, each counted whole",
}


def make(request: Request, found: dict, price: float | None = None) -> dict:
    """The report as JSON. `price` is in dollars a chip and hour."""
    chip, _ = targets.parse(request.target)
    chips = found["devices"] // chip.devices
    budget = FITS * chip.hbm_bytes / chip.devices
    memory = found.get("memory", {})
    peak = sum(memory.values()) if memory else found["refused_bytes"]
    report = dataclasses.asdict(request) | {
        "chips": chips,
        "devices": found["devices"],
        "fits": bool(memory) and peak <= budget,
        "peak_bytes_per_device": peak,
        "budget_bytes_per_device": int(budget),
        "memory": memory,
        "compile_seconds": round(found["compile_seconds"], 1),
        "lower_seconds": round(found["lower_seconds"], 1),
        "host_peak_bytes": found["host_peak_bytes"],
        "model_flops": found["model_flops"],
        "tokens": found["tokens"],
        "definitions": DEFINITIONS,
    }
    if not memory:
        return report | {"predicted_mfu": None, "step_seconds": None, "collective_bytes": None}
    peak_rate = chips * chip.bf16_flops
    seconds = found["seconds"]
    tokens_per_second = found["tokens"] / seconds
    report |= {
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "predicted_mfu": found["model_flops"] / (seconds * peak_rate),
        "collective_bytes": _collective_bytes(found),
        "hbm_bytes": found["memory_traffic_bytes"],
        "causes": causes(found, found["model_flops"] / peak_rate),
        "traffic": found["traffic"],
        "time_source": "compiler" if chip.platform == "tpu" else "model",
        "time_sources": _sources(found),
        "unknown_loops": found["unknown_loops"],
    }
    report["bound"] = max(report["causes"], key=lambda cause: cause["seconds"])["cause"]
    if price is not None:
        hours = 1e9 / tokens_per_second / 3600
        report["dollars_per_billion_tokens"] = price * chips * hours
    return report


def causes(found: dict, ideal: float) -> list[dict]:
    """Where the time of a step goes; the shares add up to one."""
    again = sum(each["seconds"] for each in found["work"] if each["again"])
    once = [each for each in found["work"] if not each["again"]]
    dense = sum(each["seconds"] for each in once if each["kind"] != "elementwise and copies")
    rest = sum(each["seconds"] for each in once if each["kind"] == "elementwise and copies")
    rows = [
        ("the model's FLOPs at peak rate", min(ideal, dense)),
        ("products and kernels below peak rate", max(0.0, dense - ideal)),
        ("elementwise and copies", rest),
        ("recomputation", again),
    ]
    exposed: dict[str, float] = {}
    for each in found["traffic"]:
        name = f"waiting for {'+'.join(each['axes']) or 'nobody'}"
        exposed[name] = exposed.get(name, 0.0) + each["exposed"]
    rows += sorted(exposed.items(), key=lambda row: -row[1])
    return [
        {"cause": cause, "seconds": seconds, "share": seconds / found["seconds"]}
        for cause, seconds in rows
        if seconds > 0
    ]


def _collective_bytes(found: dict) -> dict[str, float]:
    """By mesh axes, what a device puts on the links or takes from them in one step."""
    total: dict[str, float] = {}
    for each in found["traffic"]:
        axes = "+".join(each["axes"]) or "none"
        total[axes] = total.get(axes, 0.0) + each["bytes"]
    return total


def _sources(found: dict) -> dict[str, float]:
    """Share of the working time by where the figure comes from."""
    total: dict[str, float] = {}
    for each in found["work"]:
        total[each["source"]] = total.get(each["source"], 0.0) + each["seconds"]
    everything = sum(total.values()) or 1.0
    return {source: seconds / everything for source, seconds in total.items()}
