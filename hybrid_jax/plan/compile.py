"""Compile one request in a process of its own, and leave what was found as JSON.

    python -m hybrid_jax.plan.compile REQUEST OUT

REQUEST is JSON of `Request`. A process of its own, because a TPU compiler that is loaded once
keeps its options and its memory, and because its peak memory is a result.
"""

import dataclasses
import json
import os
import pathlib
import re
import resource
import sys
import time

from hybrid_jax import targets
from hybrid_jax.plan import clocks, hlo, network, timeline
from hybrid_jax.plan.request import Request


def examine(request: Request) -> dict:
    """What the compiler says of a request: memory, times, traffic.

    Raises ValueError for what cannot be built. A program that does not fit is a result.
    """
    chip, _ = targets.parse(request.target)
    devices = targets.devices(request.target)
    from hybrid_jax.plan import steps

    begin = time.monotonic()
    built, placement = steps.build(request, devices)
    lowered = built.function.lower(*built.arguments)
    lowered_at = time.monotonic()
    found = {
        "devices": len(devices),
        "mesh": dict(placement.mesh.shape),
        "tokens": built.tokens,
        "model_flops": built.flops,
        "lower_seconds": lowered_at - begin,
    }
    try:
        compiled = lowered.compile()
    except Exception as error:  # jax.errors.JaxRuntimeError: what else it is, is raised again
        if (used := _memory_asked_for(str(error))) is None:
            raise
        return found | _ending(lowered_at) | {"refused_bytes": used}
    found |= _ending(lowered_at)
    found["memory"] = _memory(compiled, chip.platform)
    program = hlo.read(compiled.as_text())
    if chip.platform == "tpu":
        clock: timeline.Clock = clocks.TpuClock(program, chip, built.fill)
    else:
        clock = clocks.RooflineClock(program, chip)
    links = network.Network(chip, list(placement.mesh.devices.flat))
    walked = timeline.Walk(program, clock, links, dict(placement.mesh.shape)).entry()
    return found | _told(walked)


def _ending(begin: float) -> dict:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "compile_seconds": time.monotonic() - begin,
        "host_peak_bytes": kilobytes * 1024,
    }


def _memory(compiled, platform: str) -> dict[str, int]:
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes
    if platform == "tpu":
        # What a TPU's compiler refuses a program by. Its sum of temporaries counts space twice that
        # arguments leave to them: 12 GiB of arguments and "24" of temporaries pass where 31.25 are.
        temporaries = max(0, stats.peak_memory_in_bytes - arguments - outputs)
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": temporaries,
        "code": stats.generated_code_size_in_bytes,
    }


def _memory_asked_for(message: str) -> int | None:
    """Bytes that a program wanted of a device, if that is why it was refused."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds", message
    )
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _told(walked: timeline.Timeline) -> dict:
    return {
        "seconds": walked.seconds,
        "unknown_loops": walked.unknown_loops,
        "memory_traffic_bytes": walked.memory_bytes,
        "work": [
            {"kind": kind, "source": source, "again": again, "seconds": seconds}
            for (kind, source, again), seconds in walked.work.items()
        ],
        "traffic": [
            {"kind": kind, "axes": list(axes)} | dataclasses.asdict(traffic)
            for (kind, axes), traffic in walked.traffic.items()
        ],
    }


def main(request: str, out: str) -> int:
    """0, or 2 with one sentence on standard error."""
    try:
        found = examine(Request(**json.loads(request)))
    except (ValueError, targets.CompilerMissing) as error:
        if os.environ.get("HYBRID_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    pathlib.Path(out).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
