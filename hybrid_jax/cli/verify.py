"""`hybrid-jax verify`: which checkpoints of a run are whole, and what is damaged in the others."""

import dataclasses
import json
import pathlib
import sys

import tyro

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Read every file of a run's checkpoints and hold it against the checksums written with it.

    Nothing is changed. A checkpoint without its manifest is unfinished: its save goes on, or was
    cut off. Exit code 1 if one is damaged or unfinished, 2 if there is none."""

    path: tyro.conf.Positional[pathlib.Path]
    """A training run, its directory of checkpoints, or one checkpoint."""
    step: int | None = None
    """Only this one."""
    json: pathlib.Path | None = None
    """Also write the findings to this file."""


def run(args: Args) -> int:
    """0 if all are good, 1 if not; raises ValueError if there is none."""
    import rich.console
    import rich.progress

    from hybrid_jax.checkpoint import verification

    json_report.check_writable(args.json)
    paths = verification.find(args.path, args.step)
    verdicts = []
    # On a terminal only, and gone in the end.
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("reading", total=verification.size(paths))
        for verdict in verification.examine(paths, lambda count: bar.advance(task, count)):
            verdicts.append(verdict)
            print(_line(verdict), flush=True)
    good = [verdict.path.name for verdict in verdicts if verdict.problem is None]
    newest = f", the newest is {good[-1]}" if good else ""
    print(f"{len(good)} of {len(verdicts)} good{newest}.")
    if args.json is not None:
        report = [dataclasses.asdict(verdict) | {"path": str(verdict.path)} for verdict in verdicts]
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if len(good) < len(verdicts):
        print("Bad ones are passed over by --resume, which takes the newest good.", file=sys.stderr)
        return 1
    return 0


def _line(verdict) -> str:
    if verdict.problem is not None:
        return f"{verdict.path.name}: BAD. {verdict.problem}"
    return (
        f"{verdict.path.name}: good, {verdict.files} files, {verdict.bytes / 1e6:,.1f} MB read in "
        f"{verdict.seconds:.1f} s"
    )
