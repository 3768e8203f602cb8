"""`hybrid-jax bench`: how fast the real steps are on this machine, beside their peer."""

import dataclasses
import pathlib
import sys
import typing

import tyro

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure training, prefill and decode beside transformers: same weights, token ids, float32
    and two threads, in turn, in one run. Outputs are compared before anything is timed, compile
    time is apart, and every figure is the median of the rounds. Takes about five minutes.

    Exit code 1 if the two sides do not compute the same."""

    what: typing.Annotated[typing.Literal["model"], tyro.conf.Positional]
    """What to measure."""
    against: typing.Literal["transformers"] = "transformers"
    """The peer."""
    preset: str = "quickstart"
    """The model; random weights."""
    rounds: int = 3
    """Alternating runs of each task."""
    json: pathlib.Path | None = None
    """Also write all figures to this file."""


def run(args: Args) -> int:
    """0 measured, 1 if the outputs differ; raises ValueError for bad input."""
    from hybrid_jax.bench import model

    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {args.rounds}.")
    json_report.check_writable(args.json)
    try:
        report = model.run(args.preset, args.rounds, lambda text: print(text, file=sys.stderr))
    except model.Mismatch as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(model.table(report))
    print(
        f"\nfloat32 matmul {report['matmul_gflops']:.0f} GFLOP/s, memory "
        f"{report['memory_gigabytes']:.1f} GB/s; prefill time per token at 64k "
        f"over 4k, lightning layers alone: {report['prefill_growth_4k_64k']:.2f}"
    )
    if args.json is not None:
        model.write(report, args.json)
    return 0
