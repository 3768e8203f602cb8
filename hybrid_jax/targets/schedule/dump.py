"""Compile in a fresh process with the TPU compiler's dump, and read what it wrote."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from hybrid_jax.targets import chips, compilers
from hybrid_jax.targets.schedule import flags, predict


def schedule_of(build: Callable[..., Any] | str, target: str, **arguments: Any) -> predict.Report:
    """The schedule of every Pallas kernel in a function, compiled for one device of a TPU.

    Args:
      build: a function of a module, or its name: "package.module:name", "path/to/file.py:name". It
        is called in a new process, for libtpu reads its flags once, and returns `(function,
        arguments)`: what to compile, jitted or not, and a tuple of jax.ShapeDtypeStruct.
      target: a TPU: "v5p", "v6e:4x4".
      arguments: keyword arguments for `build` that JSON can hold.

    Raises:
      ValueError: no such target, not a TPU, or a program that does not compile; or a schedule in a
        form that is not known here.
      CompilerMissing: libtpu is not installed.
    """
    chip, _ = chips.parse(target)
    if chip.platform != "tpu":
        raise ValueError(f"Schedules are read for TPUs; {target} is none.")
    compilers.require("tpu")
    where = build if isinstance(build, str) else f"{build.__module__}:{build.__qualname__}"
    with tempfile.TemporaryDirectory(prefix="hybrid-jax-schedule-") as name:
        directory = pathlib.Path(name)
        description = _compile(where, target, arguments, directory)
        if description["kernels_in_loops"]:
            raise ValueError(
                f"{description['kernels_in_loops']} kernels of {where} are called in a loop or a "
                "branch of XLA, whose trips are not counted; schedule the kernel alone."
            )
        kernels = _read(directory, description["kernels"], chip)
    return predict.Report(
        target, kernels, description["xla_cycles"], description["temporary_bytes"]
    )


def _read(directory: pathlib.Path, bodies: dict[str, str], chip: chips.Chip):
    """The schedule of every kernel; equal ones are compiled, and written, once."""
    read: dict[str, predict.KernelSchedule] = {}
    for kernel, body in bodies.items():
        if flags.files_of(directory, kernel, flags.BUNDLES):
            bundles, utilization = (
                max(flags.files_of(directory, kernel, label)).read_text(encoding="utf-8")
                for label in (flags.BUNDLES, flags.UTILIZATION)
            )
            read[body] = predict.kernel(kernel, bundles, utilization, chip)
    if missing := [kernel for kernel, body in bodies.items() if body not in read]:
        raise ValueError(f"libtpu wrote no bundles of {', '.join(missing)} to {directory}.")
    return tuple(dataclasses.replace(read[body], name=kernel) for kernel, body in bodies.items())


def _compile(where: str, target: str, arguments: dict, directory: pathlib.Path) -> dict:
    out = directory / "compiled.json"
    # Read by the compiler of the child alone; the rest of its surroundings is ours.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags.init_args(directory),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "hybrid_jax.targets.schedule.compile"]
    result = subprocess.run(
        [*command, where, target, json.dumps(arguments), str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode or not out.exists():
        told = flags.refusal(result.stderr + result.stdout)
        raise ValueError(told or f"{where} does not compile for {target}:\n{result.stderr[-4000:]}")
    return json.loads(out.read_text(encoding="utf-8"))
