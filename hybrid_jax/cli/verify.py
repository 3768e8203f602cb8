"""`hybrid-jax verify`: whether a checkpoint is what was written, or the same as another one."""

import dataclasses
import json
import pathlib
import sys

import tyro

from hybrid_jax.cli import json_report, progress_bar


@dataclasses.dataclass(frozen=True)
class Args:
    """Read all of a checkpoint again, and hold it against its checksums and its config.

    Of a training run, every file of its checkpoints is held against the checksums written with it,
    and every parameter against the run's config. Of a Hugging Face or Orbax directory, names,
    shapes and dtypes are held against its config, values must be finite, and files and tensors are
    held against manifest.json, which every save and export of this program writes. A directory from
    elsewhere has none: --write-manifest makes it, of what is there then.

    With --against, two checkpoints are compared by the parameters that they fill, whatever their
    formats, names and dtypes are; FP8 is multiplied with its scales.

    Nothing else is changed. Exit code 0: all holds, or both are the same within the tolerance;
    1: something does not hold or could not be checked (no manifest), or they differ; 2: bad input.
    """

    path: tyro.conf.Positional[str]
    """A checkpoint; a training run, its directory of checkpoints, or one of them. With --against a
    Hugging Face directory may be in storage: s3://..."""
    step: int | None = None
    """Of a run: only this one."""
    write_manifest: bool = False
    """Make manifest.json of a directory that has none, if nothing is wrong with it."""
    against: str | None = None
    """Compare with this checkpoint instead, which may be in storage likewise."""
    tolerance: float = 0.0
    """With --against: how far two values may be apart, relative to the larger one; 0.004 allows for
    one rounding to bfloat16."""
    json: pathlib.Path | None = None
    """Also write the findings to this file."""


def run(args: Args) -> int:
    """0 if all holds, 1 if not; raises ValueError for bad input."""
    from hybrid_jax.checkpoint import verification
    from hybrid_jax.checkpoint.formats.remote import is_remote

    json_report.check_writable(args.json)
    if args.against is not None:
        return _compare(args)
    if args.tolerance:
        raise ValueError("--tolerance is for --against, which compares two checkpoints.")
    if is_remote(args.path):
        raise ValueError(
            f"{args.path} is in object storage, which --against compares. Copy it to a disk, and "
            "verify that."
        )
    if not verification.is_of_run(args.path):
        return _reread(args)
    if args.write_manifest:
        raise ValueError(
            f"--write-manifest: {args.path} is of a training run. A checkpoint of a run that has "
            "no manifest was not finished, and none can be made for it."
        )
    return _verify_run(args)


def _verify_run(args: Args) -> int:
    from hybrid_jax.checkpoint import verification

    paths = verification.find(args.path, args.step)
    verdicts = []
    with progress_bar.of_bytes(verification.size(paths)) as read:
        for verdict in verification.examine(paths, read):
            verdicts.append(verdict)
            print(_line(verdict), flush=True)
    good = [verdict.path.name for verdict in verdicts if verdict.problem is None]
    newest = f", the newest is {good[-1]}" if good else ""
    print(f"{len(good)} of {len(verdicts)} good{newest}.")
    _write(args, [dataclasses.asdict(each) | {"path": str(each.path)} for each in verdicts])
    if len(good) < len(verdicts):
        print(
            "Damaged ones are passed over by --resume, which takes the newest good.",
            file=sys.stderr,
        )
        return 1
    return 0


def _line(verdict) -> str:
    if verdict.problem is not None:
        return f"{verdict.path.name}: BAD. {verdict.problem}"
    tensors = "" if verdict.tensors is None else f", {verdict.tensors} parameters fit the config"
    return (
        f"{verdict.path.name}: good, {verdict.files} files, {verdict.bytes / 1e6:,.1f} MB read in "
        f"{verdict.seconds:.1f} s{tensors}"
    )


def _reread(args: Args) -> int:
    from hybrid_jax.checkpoint import rereading

    if args.step is not None:
        raise ValueError(f"{args.path} is one checkpoint and no run: it has no step to choose.")
    size = sum(file.stat().st_size for file in pathlib.Path(args.path).rglob("*") if file.is_file())
    with progress_bar.of_bytes(size) as read:
        found = rereading.reread(args.path, write_manifest=args.write_manifest, progress=read)
    for problem in found.problems:
        print(f"PROBLEM: {problem}")
    speed = found.bytes / 1e6 / max(found.seconds, 1e-9)
    print(
        f"{args.path}: {found.tensors:,} tensors, {found.bytes / 1e9:,.3f} GB read in "
        f"{found.seconds:.1f} s ({speed:,.0f} MB/s)."
    )
    said = {
        "none": "There is no manifest.json: names, shapes and values were checked, checksums could "
        f"not be. `hybrid-jax verify {args.path} --write-manifest` makes one of what is there.",
        "holds": f"All {found.files} files and their tensors are as manifest.json says.",
        "does not hold": "It is NOT what was written, or not what its config asks for.",
        "written": f"manifest.json was written, of {found.files} files.",
    }
    print(said[found.manifest])
    report = dataclasses.asdict(found) | {"path": str(found.path), "good": found.is_good}
    _write(args, report)
    return 0 if found.is_good else 1


def _compare(args: Args) -> int:
    from hybrid_jax.checkpoint import comparison

    if args.write_manifest:
        raise ValueError("--write-manifest and --against do not go together.")
    with progress_bar.of_names() as progress:
        found = comparison.compare(
            args.path,
            args.against,
            tolerance=args.tolerance,
            step=args.step,
            progress=progress,
        )
    for line in _differences(found.differences):
        print(line)
    for note in found.notes:
        print(f"note: {note}")
    for dtypes, count in found.dtypes.items():
        here, there = dtypes.split(", ")
        if here != there:
            print(f"note: {count:,} blocks are stored as {here} here and as {there} there.")
    print(f"{found.blocks:,} blocks, {found.values:,} values compared in {found.seconds:.1f} s.")
    beyond = found.beyond
    if not found.differences:
        print("All values are the same.")
    elif not beyond:
        print(f"All values are the same within the tolerance of {args.tolerance:g}.")
    else:
        print(f"{len(beyond):,} blocks DIFFER.")
    _write(args, dataclasses.asdict(found) | {"same": not beyond})
    return 1 if beyond else 0


def _differences(differences) -> list[str]:
    """The first twenty, and how many more."""
    lines = []
    for each in differences[:20]:
        stored = " / ".join(str(name) for name in (each.here, each.there))
        if each.what == "values":
            said = (
                f"{each.differing:,} of {each.size:,} values differ, by {each.max_abs:.3g} at most "
                f"(relatively {each.max_rel:.3g})"
            )
        elif each.what == "shape":
            said = f"has shape {list(each.shapes[0])} here, {list(each.shapes[1])} there"
        else:
            said = f"is {each.what}"
        lines.append(f"{each.name} ({stored}): {said}")
    more = len(differences) - len(lines)
    return [*lines, f"... and {more:,} more (--json has them all)"] if more else lines


def _write(args: Args, report) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
