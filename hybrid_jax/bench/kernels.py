"""`bench kernels`: predicted times of the kernels on TPUs that are not here."""

import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from hybrid_jax.bench import experts
from hybrid_jax.targets.chips import Chip, parse
from hybrid_jax.targets.schedule import schedule_of

# The reference shape: MiniMax-Text-01's heads, one row of 128k tokens.
BATCH, LENGTH, HEADS, HEAD_DIM = 1, 131_072, 64, 128
DECODE_BATCH = 256
# A few tokens after a state: speculative tokens to verify.
EXTEND_LENGTH = 8

# Least times of the reference shape in ms, fixed: what must move (forward q, k, v and out; backward
# q, k, v, dout, dq, dk and dv; 2.147 GB each) at the HBM bandwidth.
IDEAL_MS = {
    "forward": {"v5e": 10.48, "v5p": 3.49, "v6e": 5.24, "tpu7x": 1.16},
    "backward": {"v5e": 18.3, "v5p": 6.11, "v6e": 9.17, "tpu7x": 2.03},
}


def _attention(packed: bool, heads: int):
    """The op on the reference shape, as a function of arrays, and its arguments."""
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, heads, HEAD_DIM), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((heads,), jnp.float32)
    segments = (jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),) if packed else ()

    def attend(q, k, v, log_decay, *segment_ids):
        return pallas_kernels.lightning_attention(
            q, k, v, log_decay,
            segment_ids=segment_ids[0] if packed else None, implementation="pallas_tpu",
        )[0]  # fmt: skip

    return attend, x, decay, segments


def forward(heads: int, packed: bool):
    """What `schedule_of` compiles: the op alone, returning `out`."""
    attend, x, decay, segments = _attention(packed, heads)
    return attend, (x, x, x, decay, *segments)


def backward(heads: int, packed: bool):
    """The gradient of q, k and v alone: what the forward leaves behind comes as an argument."""
    attend, x, decay, segments = _attention(packed, heads)

    def pull_of(q, k, v, log_decay, *segment_ids):
        return jax.vjp(lambda q, k, v: attend(q, k, v, log_decay, *segment_ids), q, k, v)[1]

    pull = jax.eval_shape(pull_of, x, x, x, decay, *segments)
    return (lambda pull, dout: pull(dout)), (pull, x)


_STEPS: dict[str, Callable[..., Any]] = {
    "decode": pallas_kernels.lightning_decode,
    "decode_slots": pallas_kernels.lightning_decode_slots,
    "extend": pallas_kernels.lightning_extend,
}


def step(heads: int, name: str):
    """A token, or a few, for each of many states or slots, which are updated in place."""
    length = (EXTEND_LENGTH,) if name == "extend" else ()
    token = jax.ShapeDtypeStruct((DECODE_BATCH, *length, heads, HEAD_DIM), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((heads,), jnp.float32)
    states = jax.ShapeDtypeStruct((DECODE_BATCH, heads, HEAD_DIM, HEAD_DIM), jnp.float32)
    slots = (jax.ShapeDtypeStruct((DECODE_BATCH,), jnp.int32),) if name == "decode_slots" else ()
    run = functools.partial(_STEPS[name], implementation="pallas_tpu")
    return jax.jit(run, donate_argnums=4), (token, token, token, decay, states, *slots)


_EXPERTS = {"grouped_forward": experts.forward, "grouped_backward": experts.backward}
NAMES = ("forward", "backward", "forward_packed", "backward_packed", *_STEPS, *_EXPERTS)


def run(target: str, names: Sequence[str], note: Callable[[str], Any]) -> dict:
    """The report of the kernels named; `note(text)` says how it goes.

    Raises what `schedule_of` raises; ValueError also for a chip without ideal times.
    """
    chip, _ = parse(target)
    if chip.name not in IDEAL_MS["forward"]:
        known = ", ".join(IDEAL_MS["forward"])
        raise ValueError(f"There are no ideal times for {target}; choose one of {known}.")
    # The times are a chip's; where it is two devices, each has half of the heads.
    heads = HEADS // chip.devices
    entries = {}
    for name in names:
        note(f"{name}: compiling for {target}")
        build, options, ideal_ms = _program(name, chip, heads)
        report = schedule_of(build, target, **options)
        entries[name] = {
            "ideal_ms": round(ideal_ms, 4),
            "predicted_ms": round(report.predicted_ms, 4),
            "roofline_fraction": round(ideal_ms / report.predicted_ms, 4),
            "program": report.to_json(),
        }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    shape = {"batch": BATCH, "length": LENGTH, "heads": HEADS, "head_dim": HEAD_DIM}
    shape |= {"decode_batch": DECODE_BATCH, "extend_length": EXTEND_LENGTH}
    shape |= {"groups": experts.GROUPS, "group_rows": experts.ROWS}
    shape |= {"width": experts.WIDTH, "hidden": experts.HIDDEN}
    return {"target": chip.name, "versions": versions, "shape": shape} | entries


def _program(name: str, chip: Chip, heads: int) -> tuple[Callable[..., Any], dict, float]:
    """What builds it, with which options, and its ideal time."""
    if name in _STEPS:
        # Every state read and written once.
        moved = 2 * 4 * DECODE_BATCH * heads * HEAD_DIM * HEAD_DIM
        return step, {"heads": heads, "name": name}, moved / chip.device_hbm_bytes_per_second * 1e3
    if name in _EXPERTS:
        kind = name.removeprefix("grouped_")
        options = {"groups": experts.GROUPS // chip.devices, "chip": chip.name}
        return _EXPERTS[name], options, experts.ideal_ms(kind, chip)
    kind, _, packed = name.partition("_")
    build = forward if kind == "forward" else backward
    return build, {"heads": heads, "packed": bool(packed)}, IDEAL_MS[kind][chip.name]


def table(report: dict) -> str:
    """The report as a Markdown table, a row a kernel of each program."""
    lines = [
        "| program | ideal ms | predicted ms | of roofline | kernel | bundles a step x steps | "
        "MXU | spills a step | GB | compute ms | HBM ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        entry = report.get(name)
        if entry is None:
            continue
        head = (
            f"| {name} | {entry['ideal_ms']:.2f} | {entry['predicted_ms']:.2f} | "
            f"{entry['roofline_fraction']:.2f} |"
        )
        for kernel in entry["program"]["kernels"]:
            doubt = "*" if kernel["unresolved"] else ""
            moved = (kernel["read_bytes"] + kernel["written_bytes"]) / 1e9
            spills = kernel["spill_stores_per_step"] + kernel["spill_fills_per_step"]
            lines.append(
                f"{head} {kernel['name']}{doubt} | {kernel['bundles_per_step']:,.0f} x "
                f"{kernel['steps']:,} | {kernel['use']['MXU']:.0%} | {spills:,.0f} | {moved:.2f} | "
                f"{kernel['compute_ms']:.2f} | {kernel['hbm_ms']:.2f} |"
            )
            head = "| | | | |"
        if entry["program"]["xla_ms"]:
            lines.append(f"{head} XLA | | | | | {entry['program']['xla_ms']:.2f} | |")
    lines.append("\n\\* branches on data (segments, slots): counted as if every one were entered.")
    return "\n".join(lines)


def write(report: dict, path: pathlib.Path) -> None:
    """Store the report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
