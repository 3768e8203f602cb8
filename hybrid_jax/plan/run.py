"""Ask for one plan: defaults, the compiler in a process of its own, the report."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from hybrid_jax import targets
from hybrid_jax.config import presets
from hybrid_jax.plan import report
from hybrid_jax.plan.defaults import default_layout
from hybrid_jax.plan.request import Request


def request_for(
    preset: str,
    target: str,
    step: str = "train",
    *,
    mesh: str | None = None,
    rules: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    **others,
) -> Request:
    """A complete request; what is None is a default for the target, the model and the step.

    Raises ValueError for an unknown preset or target, CompilerMissing without its compiler.
    """
    config = presets.get(preset)
    devices = len(targets.devices(target))
    seq = min(8192, config.max_positions) if seq is None else seq
    if seq < 1:
        raise ValueError(f"seq must be a whole number >= 1; got {seq!r}.")
    layout = default_layout(config, devices, step, seq)
    if mesh is not None and rules is None and "sequence=" in mesh:
        rules = "long_context"
    return Request(
        preset=preset,
        target=target,
        step=step,
        mesh=mesh or layout.mesh,
        rules=rules or layout.rules,
        batch=layout.batch if batch is None else batch,
        seq=seq,
        **others,
    )


def plan(request: Request, price: float | None = None, timeout: float | None = None) -> dict:
    """The report of one request; minutes for the large models.

    Raises ValueError with the compiler's reason for what cannot be compiled; a program that is too
    large for the device is a report whose `fits` is false. TimeoutError after `timeout` seconds.
    """
    targets.require(targets.parse(request.target)[0].platform)
    with tempfile.TemporaryDirectory(prefix="hybrid-jax-plan-") as name:
        out = pathlib.Path(name, "found.json")
        command = [sys.executable, "-m", "hybrid_jax.plan.compile"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Devices that tests simulate would only take memory.
            "XLA_FLAGS": "",
        }
        try:
            result = subprocess.run(
                [*command, json.dumps(dataclasses.asdict(request)), str(out)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as expired:
            raise TimeoutError(f"not compiled within {timeout:.0f} s") from expired
        if result.returncode or not out.exists():
            raise ValueError(_reason(result))
        found = json.loads(out.read_text(encoding="utf-8"))
    return report.make(request, found, price)


def _reason(result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return told[-1]
    if result.returncode < 0:
        return (
            f"The compiler's process ended with signal {-result.returncode}; if that is 9, the "
            "machine ran out of memory."
        )
    return "The step does not compile:\n" + "\n".join(lines[-15:])
