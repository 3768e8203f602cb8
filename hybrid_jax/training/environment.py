"""What a run computes with, by version: stored with the run, compared when it is resumed."""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable

import jax

import pallas_kernels
import sharding
from hybrid_jax import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Where what is imported lies, which need not be what is installed.
_OURS = (
    pathlib.Path(__file__).parents[1],
    *(pathlib.Path(package.__path__[0]) for package in (pallas_kernels, sharding)),
)


def describe() -> dict[str, str]:
    """Versions, the code's own hash, devices and XLA's flags, by name."""
    versions = {name: _version(name) for name in _LIBRARIES}
    devices = jax.devices()
    return {
        "hybrid-jax": __version__,
        "sources": _sources(),
        "python": platform.python_version(),
        **versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def store(path: pathlib.Path, step: int, note: Callable[[str], None]) -> None:
    """Append to `path` what goes on from `step`; `note` is told what differs from the last time.

    The file is a JSON list of {"step": int, "environment": {name: text}}, one a start of the run.
    Raises OSError if it cannot be written.
    """
    starts = read(path, note)
    now = describe()
    if starts:
        before = starts[-1]["environment"]
        changes = [
            f"  {name}: {before.get(name, 'unknown')}  (now: {now.get(name, 'unknown')})"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if changes:
            note(
                "The run goes on in another environment than before, so its numbers may differ "
                "from those of a run without interruption:\n" + "\n".join(changes)
            )
    starts.append({"step": step, "environment": now})
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def read(path: pathlib.Path, note: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The starts that `store` wrote; [] if there is no file, and, said by `note`, no good one."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(start["step"], int) and start["environment"].items() for start in starts):
            return starts
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    note(f"{path} is damaged and begun again: what the run was computed with before is not known.")
    return []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _sources() -> str:
    """A hash of our own code."""
    digest = hashlib.sha256()
    for root in _OURS:
        for file in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(f"{root.name}/{file.relative_to(root)}\0".encode())
            digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
