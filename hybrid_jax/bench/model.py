"""`bench model`: training, prefill and decode beside transformers, alternated in one run."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import tempfile
from typing import Any

import numpy as np

from hybrid_jax.bench import tasks
from hybrid_jax.bench.worker import THREADS, Worker
from hybrid_jax.config import presets
from hybrid_jax.config.model import ModelConfig

GROWTH_LENGTHS = (4096, 65536)
# Float32 on both sides with differently ordered sums.
LOGITS_TOLERANCE = 1e-3


class OursProcess:
    """Our side with what is measured of us alone; built inside the worker."""

    def __init__(self, directory: str):
        from hybrid_jax.bench import ours

        self._ours = ours
        self._side = ours.Ours(directory)
        self._lightning: Any = None

    def perform(self, name: str, vocab_size: int) -> tasks.Result:
        return tasks.perform(self._side, name, vocab_size)

    def machine(self) -> tuple[float, float]:
        """What the machine can do: float32 matmul GFLOP/s, and GB/s of memory read."""
        return self._ours.matmul_gflops(), self._ours.memory_gigabytes()

    def lightning_prefill(self, length: int) -> float:
        """Seconds to prefill one row with a model of lightning layers alone."""
        from hybrid_jax import model

        if self._lightning is None:
            config = self._ours.lightning_only(self._side.model.config)
            self._lightning = model.build(config)
        tokens_BT = np.random.default_rng(0).integers(
            0, self._lightning.config.vocab_size, (1, length)
        )
        return self._ours.timed_prefill(self._lightning, tokens_BT.astype(np.int32)).seconds


class TheirsProcess:
    """transformers; built inside the worker."""

    def __init__(self, directory: str):
        from hybrid_jax.bench import theirs

        self._side = theirs.Transformers(directory, THREADS)

    def perform(self, name: str, vocab_size: int) -> tasks.Result:
        return tasks.perform(self._side, name, vocab_size)


@dataclasses.dataclass
class Measured:
    """All runs of one task."""

    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    peak_ours: int = 0
    peak_theirs: int = 0


class Mismatch(Exception):
    """The two sides do not compute the same, so their times say nothing."""


def run(preset: str, rounds: int, note) -> dict:
    """The report of a whole run; `note(text)` says how it goes.

    Raises Mismatch if an output differs between the sides: nothing is timed then.
    """
    config = presets.get(preset)
    with tempfile.TemporaryDirectory(prefix="hybrid-jax-bench-") as directory:
        path = _write_weights(config, pathlib.Path(directory), note)
        ours, theirs = Worker(OursProcess, path), Worker(TheirsProcess, path)
        try:
            machine, measured = _alternate(config, ours, theirs, rounds, note)
            growth = _growth(ours, rounds, note)
        finally:
            ours.close()
            theirs.close()
    return _report(config, measured, machine, growth, rounds)


def _write_weights(config: ModelConfig, directory: pathlib.Path, note) -> str:
    from hybrid_jax import checkpoint, model

    note(f"random weights of {config.name}: {model.count(model.abstract(config)):,} parameters")
    path = directory / "weights"
    checkpoint.save(model.build(config), path, format="hf")
    return str(path)


def _alternate(config, ours: Worker, theirs: Worker, rounds: int, note):
    """(rates of the machine, runs by task): outputs compared first, then `rounds` times in turn."""
    measured = {name: Measured() for name in tasks.NAMES}
    machine = []
    for name in tasks.NAMES:
        task = measured[name]
        first, _ = ours.call("perform", name, config.vocab_size)
        reference, _ = theirs.call("perform", name, config.vocab_size)
        _compare(name, first.output, reference.output)
        for _ in range(rounds):
            machine.append(ours.call("machine")[0])
            result, task.peak_ours = ours.call("perform", name, config.vocab_size)
            task.ours.append(result.seconds)
            result, task.peak_theirs = theirs.call("perform", name, config.vocab_size)
            task.theirs.append(result.seconds)
        task.compile_seconds = max(0.0, first.seconds - statistics.median(task.ours))
        ratio = statistics.median(task.theirs) / statistics.median(task.ours)
        note(f"{name}: {ratio:.2f}x, compiled in {task.compile_seconds:.1f} s")
    return machine, measured


def _compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.dtype.kind in "iu":
        # Random weights make near ties; one different argmax sends the rest of a row elsewhere.
        same = float(np.mean(ours[:, 0] == theirs[:, 0]))
        if same < 1:
            raise Mismatch(f"{name}: the first greedy tokens differ: {ours[:, 0]}, {theirs[:, 0]}.")
        return
    error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    if not error <= LOGITS_TOLERANCE:
        raise Mismatch(
            f"{name}: outputs differ by {error:.2e} of the largest; at most "
            f"{LOGITS_TOLERANCE:.0e} is float32 rounding."
        )


def _growth(ours: Worker, rounds: int, note) -> float:
    """Prefill time per token at 64k over that at 4k, lightning layers alone."""
    short, long = GROWTH_LENGTHS
    ours.call("lightning_prefill", short)
    ratios = []
    for _ in range(rounds):
        # The short one several times: alone it is over before the machine's noise averages out.
        seconds = [ours.call("lightning_prefill", short)[0] for _ in range(4)]
        per_token = statistics.mean(seconds) / short
        ratios.append(ours.call("lightning_prefill", long)[0] / long / per_token)
    note(f"prefill time per token, lightning layers alone, 64k over 4k: {min(ratios):.2f}")
    return statistics.median(ratios)


def _report(config, measured, machine, growth, rounds) -> dict:
    from hybrid_jax.model import flops, traffic

    rate = {
        side: {
            name: tasks.tokens_measured(name) / statistics.median(getattr(task, side))
            for name, task in measured.items()
        }
        for side in ("ours", "theirs")
    }
    work = {"train": flops.training_flops(config, tasks.TRAIN_LENGTH)}
    for name, length in tasks.PREFILL_LENGTHS.items():
        # The head runs on the last position only.
        work[name] = flops.forward_flops(config, length / 2, head=False)
    moved = {
        name: traffic.decode_bytes(config, batch, tasks.DECODE_CONTEXT) / batch
        for name, batch in tasks.DECODE_BATCHES.items()
    }
    matmul, memory = (statistics.median(rates) for rates in zip(*machine, strict=True))
    return {
        "ratio": {name: rate["ours"][name] / rate["theirs"][name] for name in measured},
        "ours": rate["ours"],
        "theirs": rate["theirs"],
        "seconds": {name: dataclasses.asdict(task) for name, task in measured.items()},
        "gflops": {name: rate["ours"][name] * each / 1e9 for name, each in work.items()},
        "matmul_gflops": matmul,
        "gigabytes": {name: rate["ours"][name] * each / 1e9 for name, each in moved.items()},
        "memory_gigabytes": memory,
        "peak_bytes": {
            "ours": {name: task.peak_ours for name, task in measured.items()},
            "theirs": {name: task.peak_theirs for name, task in measured.items()},
        },
        "prefill_growth_4k_64k": growth,
        "versions": _versions(),
        "preset": config.name,
        "rounds": rounds,
        "threads": THREADS,
        # Both sides run under it: see hybrid_jax/cli/huge_pages.py.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _versions() -> dict:
    packages = ("hybrid-jax", "jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"python": platform.python_version(), "machine": platform.processor() or "?"}


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = [
        "| task | ours, tokens/s | transformers, tokens/s | ratio | achieved | of the machine's | "
        "peak MiB, ours / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ratio in report["ratio"].items():
        if name in report["gflops"]:
            achieved, unit, most = report["gflops"][name], "GFLOP/s", report["matmul_gflops"]
        else:
            achieved, unit, most = report["gigabytes"][name], "GB/s", report["memory_gigabytes"]
        peak = report["peak_bytes"]
        lines.append(
            f"| {name} | {report['ours'][name]:,.0f} | {report['theirs'][name]:,.0f} | "
            f"{ratio:.2f}x | {achieved:.0f} {unit} | {achieved / most:.0%} | "
            f"{peak['ours'][name] >> 20} / {peak['theirs'][name] >> 20} |"
        )
    return "\n".join(lines)


def write(report: dict, path) -> None:
    """Store the report as JSON."""
    pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
