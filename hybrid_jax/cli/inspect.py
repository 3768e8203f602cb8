"""`hybrid-jax inspect`: what a checkpoint directory holds, and what is wrong with it."""

import dataclasses
import json
import pathlib
import typing

import tyro

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Show what a checkpoint holds: tensors, shapes, dtypes, sizes, the model that its config
    describes and the preset that is, and whatever is missing, unknown or damaged.

    Headers and metadata are read, no weights: seconds for the largest checkpoint. Any format does:
    Hugging Face (also config.json and an index alone), Orbax as written here, a training run.

    Exit code 0: a whole checkpoint; 1: something is missing, unknown or damaged; 2: no checkpoint.
    """

    path: typing.Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Directory of the checkpoint, or of a run; a Hugging Face one also in storage: s3://..."""
    preset: str | None = None
    """Hold the tensors against this preset, instead of against the directory's own config."""
    step: int | None = None
    """Of a run: this checkpoint instead of the newest."""
    json: pathlib.Path | None = None
    """Also write everything to this file."""
    plot: pathlib.Path | None = None
    """Also draw the sizes by part and by layer into this PNG."""


def run(args: Args) -> int:
    """0 for a whole checkpoint, 1 for another; raises ValueError for none."""
    from hybrid_jax.checkpoint import inspection, sizes

    for path, option in ((args.json, "--json"), (args.plot, "--plot")):
        json_report.check_writable(path, option)
    found = inspection.inspect(args.path, preset=args.preset, step=args.step)
    report = _report(found)
    print(_text(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        from hybrid_jax.checkpoint.formats import folders
        from hybrid_jax.observe.parts import draw_parts

        if found.match is None:
            raise ValueError(f"--plot: without a model nothing says what {args.path} is made of.")
        parts = sizes.parts(found.model, found.match, found.infos)
        drawn = [(part.name, part.layer, part.bytes) for part in parts]
        taken = "" if found.has_all_forms else " (sizes as its config asks for)"
        name = pathlib.PurePath(folders.absolute(args.path)).name
        draw_parts(drawn, args.plot, title=f"{name}{taken}")
    return 1 if found.problems else 0


def _report(found) -> dict:
    """All that is said, as JSON has it."""
    match, config, listing = found.match, found.config, found.listing
    return {
        "path": str(found.folder),
        "container": listing.container,
        "vocabulary": listing.vocabulary,
        "dialect": None if found.description is None else found.description.model_type,
        "step": listing.step,
        "layers": None if config is None else config.num_layers,
        "model": None if config is None else _model(config),
        "parameters": None if found.parameters is None else found.parameters[0],
        "active_parameters": None if found.parameters is None else found.parameters[1],
        "presets": None if found.closest is None else list(found.closest.names),
        "differences": None if found.closest is None else list(found.closest.differences),
        "held_against": found.against,
        "quantization": found.quantization,
        "files": len(set(listing.files.values())) or None,
        "absent_files": listing.absent,
        "index_bytes": listing.index_bytes,
        "sizes_are_read": found.has_all_forms,
        "tensors": _tensors(found),
        "missing": [] if match is None else match.missing,
        "unknown": [] if match is None else match.unknown,
        "wrong": {} if match is None else match.wrong,
        "sidecars": found.sidecars,
        "manifest": found.checksums,
        "notes": found.notes,
        "problems": found.problems,
    }


def _tensors(found) -> list[dict]:
    """A row for each pattern of stored tensors."""
    from hybrid_jax.checkpoint.names import folding

    infos = found.infos

    def form(name):
        return None if infos[name] is None else (infos[name].shape, infos[name].dtype)

    rows = []
    for group in folding.fold(infos, form):
        info = infos[group.names[0]]
        rows.append(
            {
                "name": group.pattern,
                "count": len(group.names),
                "dtype": None if info is None else info.dtype,
                "shape": None if info is None else list(info.shape),
                "bytes": None if info is None else len(group.names) * info.nbytes,
            }
        )
    return rows


def _model(config) -> str:
    """`80 layers (70 lightning, 10 softmax), width 6144, 32 experts, 2 a token, 200064 words`."""
    kinds: dict[str, int] = {}
    for layer in config.layers:
        kind = type(layer.mixer).__name__.removesuffix("Attention").lower()
        kinds[kind] = kinds.get(kind, 0) + 1
    ffns = {layer.ffn for layer in config.layers}
    experts = [
        f"{ffn.num_experts} experts of {ffn.hidden_dim}, {ffn.router.experts_per_token} a token"
        for ffn in ffns
        if hasattr(ffn, "router")
    ]
    mixers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return "; ".join(
        [
            f"{config.num_layers} layers ({mixers})",
            f"width {config.hidden_dim}",
            *sorted(experts or ["dense feed-forwards"]),
            f"{config.vocab_size} words",
        ]
    )


def _text(report: dict) -> str:
    rows = report["tensors"]
    known = [row["bytes"] for row in rows if row["bytes"] is not None]
    total, tensors = sum(known), sum(row["count"] for row in rows)
    sizes = "" if report["sizes_are_read"] else ", sizes as the config asks for"
    files = f" in {report['files']:,} files" if report["files"] else ""
    lines = [
        f"{report['path']}: {report['container']}{_step(report)}, {tensors:,} tensors{files}, "
        f"{total:,} bytes{sizes}",
        f"  config        {_config(report)}",
        f"  preset        {_preset(report)}",
        f"  quantisation  {report['quantization']}",
        f"  sidecars      {', '.join(report['sidecars']) or 'none'}",
        f"  manifest      {report['manifest']}",
        "",
        *_table(rows),
        "",
        *(f"note: {note}" for note in report["notes"]),
        *(f"PROBLEM: {problem}" for problem in report["problems"]),
    ]
    whole = "A whole checkpoint." if not report["problems"] else "NOT a whole checkpoint."
    against = f" Held against {report['held_against']}." if report["held_against"] else ""
    return "\n".join([*lines, whole + against])


def _step(report: dict) -> str:
    return "" if report["step"] is None else f", step {report['step']}"


def _config(report: dict) -> str:
    if report["model"] is None:
        return "none that can be read"
    dialect = f"{report['dialect']}: " if report["dialect"] else ""
    total, active = report["parameters"], report["active_parameters"]
    counts = "" if total is None else f"; {total:,} parameters, {active:,} a token"
    return f"{dialect}{report['model']}{counts}"


def _preset(report: dict) -> str:
    if not report["presets"]:
        return "unknown"
    names, differences = ", ".join(report["presets"]), report["differences"]
    if not differences:
        return names
    more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"nearest {names} ({'; '.join(differences[:3])}{more})"


def _table(rows: list[dict]) -> list[str]:
    cells = [
        (
            row["name"],
            row["dtype"] or "?",
            "?" if row["shape"] is None else str(row["shape"]),
            f"{row['count']:,}",
            "?" if row["bytes"] is None else f"{row['bytes']:,}",
        )
        for row in rows
    ]
    head = ("tensor", "dtype", "shape", "count", "bytes")
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    marks = "<<<>>"
    return [
        "  ".join(
            f"{cell:{mark}{width}}" for cell, mark, width in zip(line, marks, widths)
        ).rstrip()
        for line in (head, *cells)
    ]
