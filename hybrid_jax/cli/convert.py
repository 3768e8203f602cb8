"""`hybrid-jax convert`: one checkpoint format into another, tensor by tensor."""

import dataclasses
import json
import os
import pathlib
import sys
import typing

import tyro

from hybrid_jax.cli import dry_run, json_report, progress_bar

# In effect one file.
_MOST_GB = 1_000_000


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert a checkpoint directory; the model is never held in memory, only a few tensors are.

    Read are Hugging Face directories (Text-01 and M1 as released, transformers' `minimax`, M2 in
    bfloat16 and in FP8; one safetensors file or shards), Orbax as written here, and training runs,
    whose newest good checkpoint is exported, with what LoRA learnt merged in. Every tensor is used
    exactly once, and the destination appears whole at the end or not at all, with a manifest of
    checksums. Killed or out of disk, the same command goes on where it ended.

    Several machines that see the same files share the work if each is given its number; a SLURM
    step and JAX's variables (JAX_PROCESS_ID, JAX_NUM_PROCESSES, JAX_COORDINATOR_ADDRESS) give it
    too. Process 0 waits for the others and finishes.

    Exit code 0: converted, or this process's share of it; 2: bad input, or a destination that
    cannot be written.
    """

    src: typing.Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Directory of the checkpoint, or of a run; a Hugging Face one also in storage: s3://..."""
    dst: typing.Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")] = ""
    """Directory to create; none with --dry-run."""
    format: typing.Literal["orbax", "hf", "hf-original", "hf-vl-01"] = dataclasses.field(
        kw_only=True
    )
    """hf: as transformers writes it; hf-original: as MiniMax released it; hf-vl-01: the language
    part of VL-01, names behind `language_model.`; orbax: for JAX."""
    dtype: typing.Literal["float32", "bfloat16", "fp8"] | None = None
    """Dtype of all weights (routers stored in float32 stay so); fp8: of the matrices of layers, in
    blocks with scales, the rest in bfloat16; as stored if not given."""
    json: pathlib.Path | None = None
    """Also write the summary to this file."""
    overwrite: bool = False
    """Replace a destination that is not empty."""
    allow_nonfinite: bool = False
    """Take weights that are NaN or infinite as they are."""
    shard_gb: float = 5.0
    """Largest safetensors file in GB, unless one tensor is larger."""
    workers: int | None = None
    """Local processes that share the work, each in the memory of a few tensors. If not given, as
    many as processors, at most 4, and one for each GB."""
    process: int | None = None
    """Which of several processes this is, from 0; goes with --of."""
    of: int | None = None
    """How many processes there are, on machines that see the same files."""
    language_only: bool = False
    """Of VL-01: leave the vision part out, which nothing here computes."""
    dry_run: bool = False
    """Write nothing: print where every tensor goes, or why it is refused. Of SRC, config.json and
    the index are enough."""
    full: bool = False
    """With --dry-run: a line for each tensor instead of one for each kind."""


def run(args: Args) -> int:
    """0 when converted; raises ValueError or OSError for bad input."""
    import jax

    from hybrid_jax.checkpoint import convert

    json_report.check_writable(args.json)
    if args.dry_run:
        return dry_run.run(args)
    process, of = _place(args)
    if not 0 < args.shard_gb <= _MOST_GB:
        raise ValueError(
            f"--shard-gb must be a number above 0, up to {_MOST_GB:,}; got {args.shard_gb}."
        )
    # No accelerator is needed, and nobody else could have it meanwhile.
    jax.config.update("jax_platforms", "cpu")
    with progress_bar.of_names() as progress:
        summary = convert(
            args.src,
            args.dst,
            args.format,
            args.dtype,
            progress,
            check_finite=not args.allow_nonfinite,
            overwrite=args.overwrite,
            shard_bytes=round(args.shard_gb * 1e9),
            workers=args.workers,
            process=process,
            of=of,
            note=lambda said: print(said, file=sys.stderr, flush=True),
            language_only=args.language_only,
        )
    share = "" if of == 1 else f"process {process} of {of} wrote {summary.written / 1e9:.3f} GB of "
    print(
        f"{args.dst}: {share}{summary.tensors:,} tensors, {summary.bytes / 1e9:.3f} GB in "
        f"{summary.seconds:.1f} s ({summary.written / 1e6 / summary.seconds:,.0f} MB/s), peak "
        f"memory {summary.peak_rss_bytes / 2**20:,.0f} MiB"
        + ("" if summary.is_complete else "; process 0 finishes when all are done")
    )
    if args.json is not None:
        report = {"format": args.format, "dtype": args.dtype} | summary._asdict()
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _place(args: Args) -> tuple[int, int]:
    """Which process this is, of how many."""
    from sharding import processes

    if args.process is None and args.of is None:
        return processes.place(os.environ)
    if args.process is None or args.of is None:
        raise ValueError("--process and --of go together: which one this is, of how many.")
    return args.process, args.of
