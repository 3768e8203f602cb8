"""Times the GPU kernels of lightning attention, beside flash-linear-attention where it is given.

Checks come first and a wrong result ends the run. Then each line of the plan is timed --rounds
times, ours and the peer's in turn, who goes first changing with every round; the median counts. Run
it by scripts/bench_gpu.sh. Bytes are the least that the operation can move, so that GB/s compare
algorithms: 4 tensors forward, 7 more for the gradient, each state read and written once in decode.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import targets
from scripts import bench_gpu_checks as checks
from scripts import bench_gpu_ours as ours

_SIZE = 128
_BF16 = 2
_MODES = ("forward", "forward+backward", "packed", "decode")


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table."""

    mode: str
    batch: int
    length: int
    heads: int
    sequences: int = 1

    @property
    def name(self) -> str:
        shape = f"B{self.batch} H{self.heads} D{_SIZE}"
        if self.mode != "decode":
            shape += f" T{self.length}"
        return shape + (f" in {self.sequences}" if self.sequences > 1 else "")

    @property
    def bounds(self) -> np.ndarray | None:
        """First tokens of the packed sequences, and the end of the last."""
        if self.mode != "packed":
            return None
        return np.linspace(0, self.length, self.sequences + 1).astype(np.int32)

    @property
    def bytes(self) -> int:
        """The least that must be moved: inputs read once, results written once."""
        state = 4 * self.batch * self.heads * _SIZE * _SIZE
        tensor = _BF16 * self.batch * self.length * self.heads * _SIZE
        if self.mode == "decode":
            return 2 * state + 4 * tensor
        # The gradient reads q, k, v and dout, and writes dq, dk and dv.
        tensors = 4 + (7 if self.mode == "forward+backward" else 0)
        return tensors * tensor + 2 * state


def plan(modes, quick: bool) -> list[Line]:
    """The shapes of two public tables and the reference shape, 131072 tokens of 64 heads."""
    shapes = [(1, 8192, 96), (2, 16384, 16), (4, 4096, 64), (1, 16384, 64), (2, 16384, 64)]
    shapes = [(1, 8192, 96)] if quick else [*shapes, (1, 131072, 64)]
    lines = [Line(mode, *shape) for mode in _MODES[:2] for shape in shapes]
    lines += [Line("packed", 1, 32768, 64, sequences) for sequences in (5, 16)]
    lines += [Line("decode", batch, 1, 64) for batch in (1, 16, 64, 256)]
    return [line for line in lines if line.mode in modes]


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_gpu.sh", description=__doc__.replace("\n\n", "\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--peer", type=pathlib.Path, metavar="DIR",
        help="folder into which the wheels of flash-linear-attention and fla-core were unpacked "
        "(python -m zipfile -e WHEEL DIR); without it our columns alone are printed",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=pathlib.Path, default=pathlib.Path("bench_gpu.json"), metavar="FILE",
        help="where the figures go (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--only", choices=_MODES, action="append", help="may come repeatedly")
    parser.add_argument("--quick", action="store_true", help="the shortest shape of each kind")
    parser.add_argument("--rounds", type=int, default=7, help="timings a line (default: 7)")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="no GPU: print the plan with ideal times, and lower each program for CUDA",
    )  # fmt: skip
    return parser.parse_args(arguments)


def ceiling(device_kind: str) -> targets.Chip | None:
    """What the chip can do, if it is one we know."""
    known = (chip for chip in targets.CHIPS.values() if chip.platform == "cuda")
    return next((chip for chip in known if chip.device_kind == device_kind), None)


def dry_run(lines: list[Line]) -> int:
    """Everything that can be said and tried without a GPU."""
    chips = [targets.CHIPS[name] for name in ("h100", "h200")]
    print(f"{'mode':17} {'shape':26} {'MB':>9}" + "".join(f"{c.name:>7} ms" for c in chips))
    for line in lines:
        ideal = "".join(f"{line.bytes / c.hbm_bytes_per_second * 1e3:10.3f}" for c in chips)
        print(f"{line.mode:17} {line.name:26} {line.bytes / 1e6:9.1f}{ideal}", flush=True)
        lowered = ours.lower(line)
        if "mosaic_gpu" not in lowered.as_text():
            print(f"{line.name}: the kernel is not in the lowered program")
            return 1
    print(f"{len(lines)} programs hold our kernel when lowered for CUDA; nothing was timed.")
    return 0


def measure(line: Line, contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each contestant, in turn, the first of a round changing."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds):
        names = list(contestants)
        for name in names if round_ % 2 == 0 else reversed(names):
            times[name].append(contestants[name]())
    record: dict[str, Any] = dataclasses.asdict(line) | {"bytes": line.bytes}
    for name, values in times.items():
        record[name] = {
            "ms": statistics.median(values),
            "ms_all": values,
            "gb_per_s": line.bytes / statistics.median(values) / 1e6,
        }
    return record


def show(record: dict[str, Any], line: Line, chip: targets.Chip | None) -> None:
    mine = record["ours"]
    text = f"{line.mode:17} {line.name:26} {mine['ms']:9.3f} {mine['gb_per_s']:8.0f}"
    share = None
    if chip is not None:
        share = record["fraction_of_ceiling"] = mine["gb_per_s"] * 1e9 / chip.hbm_bytes_per_second
    text += f" {share:8.1%}" if share is not None else f" {'?':>8}"
    if "fla" in record:
        record["times_as_fast_as_fla"] = record["fla"]["ms"] / mine["ms"]
        text += f" {record['fla']['ms']:9.3f} {record['times_as_fast_as_fla']:7.2f}x"
    print(text, flush=True)


def main(arguments=None) -> int:
    options = parse(arguments)
    lines = plan(options.only or _MODES, options.quick)
    if options.dry_run:
        return dry_run(lines)
    if jax.default_backend() != "gpu":
        sys.exit(f"This needs an NVIDIA GPU, JAX runs on {jax.default_backend()}; try --dry-run.")
    device = jax.devices()[0]
    chip = ceiling(device.device_kind)
    if chip is None:
        print(f"No ceiling is known of {device.device_kind!r}: fractions are left out.")
    fla = None
    if options.peer is not None:
        from scripts import bench_gpu_peer

        fla = bench_gpu_peer.Peer(options.peer)
    checks.contract()
    print(f"{'mode':17} {'shape':26} {'ms':>9} {'GB/s':>8} {'of peak':>8}", end="")
    print(f" {'fla ms':>9} {'ratio':>8}" if fla else "")
    records = []
    for line in lines:
        inputs = make_inputs(line)
        checks.against_xla(line, inputs)
        contestants = {"ours": ours.timer(line, inputs)}
        if fla is not None:
            contestants["fla"] = fla.timer(line, inputs)
        records.append(measure(line, contestants, options.rounds))
        show(records[-1], line, chip)
    options.json.write_text(json.dumps(_report(records, device, fla), indent=1) + "\n")
    print(f"Written to {options.json}.")
    return 0


def make_inputs(line: Line) -> ours.Inputs:
    """Silu of normal numbers as a layer sees them, on the GPU; slopes of the first layer."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (line.batch, line.length, line.heads, _SIZE)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    state = jax.random.normal(keys[4], (line.batch, line.heads, _SIZE, _SIZE), jnp.float32)
    slopes = 2.0 ** (-8 * np.arange(1, line.heads + 1) / line.heads)
    return ours.Inputs(
        *(jax.nn.silu(x) for x in (q, k, v)), dout, jnp.asarray(-slopes, jnp.float32), state,
        line.bounds,
    )  # fmt: skip


def _report(records, device, fla) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "jax": jax.__version__,
        "peer": fla.versions if fla else None,
        "lines": records,
    }


if __name__ == "__main__":
    sys.exit(main())
