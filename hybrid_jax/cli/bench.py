"""`hybrid-jax bench`: the real steps on this machine, and kernels on chips that are not here."""

import dataclasses
import pathlib
import sys
import typing

import tyro
import tyro.extras

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Model:
    """Measure training, prefill and decode beside transformers: same weights, token ids, float32
    and two threads, in turn, in one run. Outputs are compared before anything is timed, compile
    time is apart, and every figure is the median of the rounds. Takes about five minutes.

    Exit code 1 if the two sides do not compute the same."""

    against: typing.Literal["transformers"] = "transformers"
    """The peer."""
    preset: str = "quickstart"
    """The model; random weights."""
    rounds: int = 3
    """Alternating runs of each task."""
    json: pathlib.Path | None = None
    """Also write all figures to this file."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Predict what our kernels take on a TPU, without one: compile each with the TPU
    compiler (the extra `aot`) and count the instructions it schedules. A lower bound that repeats
    exactly; docs/benchmarks/kernels.md says what it leaves out. Takes about three minutes."""

    target: str
    """v5e, v5p, v6e or tpu7x."""
    kernel: tuple[str, ...] = ()
    """Only these: forward, backward, forward_packed, backward_packed, decode, decode_slots,
    extend, grouped_forward, grouped_backward."""
    json: pathlib.Path | None = None
    """Also write all figures to this file."""


def parse(argv: list[str]) -> Model | Kernels:
    """The options of `bench model` or `bench kernels`."""
    return tyro.extras.subcommand_cli_from_dict(
        {"model": Model, "kernels": Kernels}, args=argv, prog="hybrid-jax bench"
    )


def run(args: Model | Kernels) -> int:
    """0 measured, 1 if the outputs differ; raises ValueError for bad input."""
    json_report.check_writable(args.json)
    return _run_kernels(args) if isinstance(args, Kernels) else _run_model(args)


def _run_kernels(args: Kernels) -> int:
    from hybrid_jax.bench import kernels

    if unknown := set(args.kernel) - set(kernels.NAMES):
        raise ValueError(f"There is no kernel {sorted(unknown)}; there are {kernels.NAMES}.")
    names = args.kernel or kernels.NAMES
    report = kernels.run(args.target, names, lambda text: print(text, file=sys.stderr))
    print(kernels.table(report))
    if args.json is not None:
        kernels.write(report, args.json)
    return 0


def _run_model(args: Model) -> int:
    from hybrid_jax.bench import model

    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {args.rounds}.")
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
