"""From bundles and how often they are issued to a predicted time."""

import dataclasses
import math
import re

from hybrid_jax.targets.chips import Chip, parse
from hybrid_jax.targets.schedule import bundles, execute

# How long a matrix unit is busy with one `vmatmul`, 16 rows: one row a cycle with 128 x 128 units,
# two with 256 x 256. From peak rates, and the number of these in a product whose FLOPs are
# known. The compiler may issue them faster than that; then a core has to wait.
MATMUL_CYCLES = {"v4": 16, "v5e": 16, "v5p": 16, "v6e": 8, "tpu7x": 8}

# Columns of the utilization file that are reported; it has one row a bundle.
_SPILLS, _FILLS = "VSTORE:SPILL", "VLOAD:FILL"


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """One kernel on one device."""

    name: str
    grid: tuple[int, ...] | None
    """As one core sees it: a parallel dim is halved on a megacore chip."""
    steps: int
    """Grid steps of one core."""
    program_bundles: int
    """The kernel's code."""
    bundles: int
    """Issued by one core (the busier one) from start to end."""
    cycles: int
    """The same, and the waits for matrix units that are given work faster than they do it."""
    use: dict[str, float]
    """Mean share of each unit in use, of what the unit can issue: MXU, VALU, VLOAD and so on."""
    spill_stores_per_step: float
    spill_fills_per_step: float
    read_bytes: int
    written_bytes: int
    """HBM traffic of all cores of the device."""
    dmas: int
    unresolved: int
    """Branches and copies that depend on data; see hybrid_jax/targets/schedule/__init__.py."""
    compute_ms: float
    hbm_ms: float

    @property
    def bundles_per_step(self) -> float:
        return self.bundles / self.steps

    @property
    def predicted_ms(self) -> float:
        return max(self.compute_ms, self.hbm_ms)

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {
            "bundles_per_step": self.bundles_per_step,
            "predicted_ms": self.predicted_ms,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled function: its kernels, and what XLA does before, between and after them."""

    target: str
    kernels: tuple[KernelSchedule, ...]
    xla_cycles: dict[str, int]
    """Estimated cycles of every other operation that has an estimate."""
    temporary_bytes: int

    @property
    def xla_ms(self) -> float:
        return sum(self.xla_cycles.values()) / parse(self.target)[0].clock_hz * 1e3

    @property
    def predicted_ms(self) -> float:
        return sum(kernel.predicted_ms for kernel in self.kernels) + self.xla_ms

    def to_json(self) -> dict:
        return {
            "target": self.target,
            "predicted_ms": self.predicted_ms,
            "xla_ms": self.xla_ms,
            "xla_cycles": self.xla_cycles,
            "temporary_bytes": self.temporary_bytes,
            "kernels": [kernel.to_json() for kernel in self.kernels],
        }


def kernel(name: str, bundle_text: str, utilization_text: str, chip: Chip) -> KernelSchedule:
    """The schedule of one kernel from the two files the compiler wrote."""
    program = bundles.read(bundle_text)
    capacity, rows = _utilization(utilization_text)
    if len(rows) != len(program.bundles):
        raise ValueError(f"{name}: {len(program.bundles)} bundles, but utilization of {len(rows)}.")
    cores = range(chip.cores_per_device) if chip.cores_per_device > 1 else (None,)
    runs = [execute.run(program, core) for core in cores]
    times = [_matmul_time(program, run, capacity["MXU"], MATMUL_CYCLES[chip.name]) for run in runs]
    (cycles, busy), slowest = max(zip(times, runs, strict=True), key=lambda pair: pair[0][0])
    issued = {
        unit: sum(count * row[at] for count, row in zip(slowest.counts, rows, strict=True))
        for at, unit in enumerate(capacity)
    }
    steps = math.prod(program.grid) if program.grid else max(slowest.steps, 1)
    read = sum(run.read_bytes for run in runs)
    written = sum(run.written_bytes for run in runs)
    return KernelSchedule(
        name=name,
        grid=program.grid,
        steps=steps,
        program_bundles=len(program.bundles),
        bundles=sum(slowest.counts),
        cycles=cycles,
        use={
            unit: round((busy if unit == "MXU" else issued[unit]) / (most * cycles), 4)
            for unit, most in capacity.items()
            if unit not in (_SPILLS, _FILLS)
        },
        spill_stores_per_step=issued[_SPILLS] / steps,
        spill_fills_per_step=issued[_FILLS] / steps,
        read_bytes=read,
        written_bytes=written,
        dmas=sum(run.dmas for run in runs),
        unresolved=sum(run.unresolved for run in runs),
        compute_ms=cycles / chip.clock_hz * 1e3,
        hbm_ms=(read + written) / chip.device_hbm_bytes_per_second * 1e3,
    )


def _matmul_time(
    program: bundles.Program, run: execute.Run, units: int, each: int
) -> tuple[int, int]:
    """(cycles of a core, cycles its matrix units are busy).

    Code without a branch takes its bundles, or what the busiest unit needs for the products in it.
    """
    cycles = busy = 0
    for start, stop, count in run.blocks:
        started = [unit for bundle in program.bundles[start:stop] for unit in bundle.matmuls]
        named = [started.count(unit) for unit in range(units)]
        # Where the text names no unit, the work is spread evenly.
        most = max(named) + -(-started.count(None) // units)
        cycles += count * max(stop - start, most * each)
        busy += count * len(started) * each
    return cycles, busy


def _utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """(what each unit can issue in a cycle, what each bundle issues)."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    units = re.split(r",\s*", lines[0].strip())
    numbers = [[int(cell) for cell in line.split()] for line in lines[1:]]
    if {_SPILLS, _FILLS, "MXU"} - set(units) or any(len(row) != len(units) for row in numbers):
        raise ValueError("The table of utilization is not as it was in libtpu 0.0.42.")
    return dict(zip(units, numbers[0], strict=True)), numbers[1:]


def table(report: Report) -> str:
    """The report as a Markdown table, a row a kernel."""
    lines = [
        "| kernel | steps a core | bundles a step | MXU | spills + fills a step | GB | "
        "compute ms | HBM ms | predicted ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in report.kernels:
        moved = (each.read_bytes + each.written_bytes) / 1e9
        doubt = " (unresolved branches)" if each.unresolved else ""
        lines.append(
            f"| {each.name}{doubt} | {each.steps:,} | {each.bundles_per_step:,.0f} | "
            f"{each.use['MXU']:.0%} | "
            f"{each.spill_stores_per_step:.0f} + {each.spill_fills_per_step:.0f} | {moved:.2f} | "
            f"{each.compute_ms:.2f} | {each.hbm_ms:.2f} | {each.predicted_ms:.2f} |"
        )
    if report.xla_ms:
        lines.append(f"| XLA around them | | | | | | | | {report.xla_ms:.2f} |")
    return "\n".join(lines)
