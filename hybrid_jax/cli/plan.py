"""`hybrid-jax plan`: will it fit, how fast will it be, and what will it wait for, without chips."""

import dataclasses
import json
import pathlib
import sys
import typing

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile the real step of a model for a pod that is not here, with the chips' own compiler,
    and say whether it fits, how long a step takes, what bounds it, and what it costs. One to six
    minutes for the largest models; no chip is needed, the extra `aot` is.

    Exit code 1 if the step does not fit, 2 for bad input."""

    preset: str
    """Model, as `hybrid-jax presets` lists them."""
    target: str
    """Chip and topology: v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, h200:8, b200:8. TPU topologies count
    chips."""
    step: typing.Literal["train", "prefill", "decode", "rl"] = "train"
    """Which step; rl is one update of a policy on sampled answers (CISPO), which decode samples."""
    mesh: str | None = None
    """Sizes of data, fsdp, expert, sequence and tensor, e.g. 'fsdp=64,expert=8', in devices;
    default: one for the target, model and step."""
    rules: str | None = None
    """What the axes split: fsdp, fsdp_tensor, expert, long_context, long_rows or serve."""
    batch: int | None = None
    """Rows of the whole batch; default: one a device to train on."""
    seq: int | None = None
    """Tokens a row, or of context; default 8192."""
    remat: str | None = None
    """What the backward pass computes again; default: the preset's."""
    moments: typing.Literal["float32", "bfloat16"] = "float32"
    """How AdamW keeps its moments: 8 bytes a parameter, or 4."""
    accumulate: int = 1
    """Rounds a batch is split into."""
    capacity: float | None = None
    """Rows the experts of a device take, as a multiple of an even share; what is beyond is dropped.
    Default: none is, and buffers hold the worst case."""
    token_groups: int = 1
    """Parts that a device's tokens travel to experts in, so that one may travel while another is
    multiplied."""
    chunk: int = 8192
    """Tokens of a prompt that prefill takes at a time."""
    search: bool = False
    """Also try other remat policies, batches and meshes, and rank them: a dozen compilations."""
    price: float | None = None
    """Dollars a chip and hour, for dollars a billion tokens."""
    json: pathlib.Path | None = None
    """Also write the report (with --search: the list of them) to this file."""
    png: pathlib.Path | None = None
    """Also draw time and memory into this file."""


def run(args: Args) -> int:
    """0 if it fits (with --search: if anything does), 1 if not."""
    from hybrid_jax.plan import plot, table
    from hybrid_jax.plan.run import plan, request_for
    from hybrid_jax.plan.search import search

    json_report.check_writable(args.json)
    if args.price is not None and not args.price > 0:
        raise ValueError(
            f"--price is in dollars a chip and hour and must be > 0; got {args.price}."
        )
    note = lambda text: print(text, file=sys.stderr, flush=True)
    request = request_for(
        args.preset, args.target, args.step, mesh=args.mesh, rules=args.rules, batch=args.batch,
        seq=args.seq, remat=args.remat, moments=args.moments, accumulate=args.accumulate,
        chunk=args.chunk, capacity=args.capacity, token_groups=args.token_groups,
    )  # fmt: skip
    if args.search:
        reports, failures = search(request, note, args.price)
        print("\n".join(table.search_lines(reports, failures)))
        if reports:
            print("\n" + "\n".join(table.lines(reports[0])))
    else:
        note(f"Compiling {request.preset} for {request.target} as {request.mesh} ...")
        reports = [plan(request, args.price)]
        print("\n".join(table.lines(reports[0])))
    if args.json is not None:
        content = reports if args.search else reports[0]
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.png is not None and any(each["step_seconds"] for each in reports):
        plot.draw(reports, args.png)
    return 0 if any(each["fits"] for each in reports) else 1
