"""`hybrid-jax report`: one HTML page about one run, or several side by side."""

import dataclasses
import pathlib
import sys

import tyro
import yaml


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw what runs have recorded into one HTML page that opens without a network: losses,
    learning rate, throughput, memory, norms, routers, what happened, and what differs between the
    runs. Runs that still train can be drawn too.

    Exit code 2 if a directory holds no run, or a file of it is damaged."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Directories of runs, as `hybrid-jax train --out` made them."""
    out: pathlib.Path = pathlib.Path("report.html")
    """The page; what is there is replaced."""


def run(args: Args) -> int:
    """0 when the page is written."""
    from hybrid_jax.observe import report

    if not args.runs:
        raise ValueError("Name at least one run: hybrid-jax report RUN [RUN ...].")
    names = _names(args.runs)
    runs = [_read(path, name, report) for path, name in zip(args.runs, names, strict=True)]
    page = report.render(runs)
    args.out.write_text(page, encoding="utf-8")
    print(f"{args.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page) / 1e6:.1f} MB.")
    return 0


def _names(paths: tuple[pathlib.Path, ...]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("The same run is named twice; name each once.")


def _read(path: pathlib.Path, name: str, report):
    from hybrid_jax.observe import read_metrics
    from hybrid_jax.training import environment
    from hybrid_jax.training.run import RunDirectory

    files = RunDirectory(path)
    if not files.metrics.is_file():
        raise FileNotFoundError(
            f"{path} holds no run with metrics: there is no {files.metrics.name} in it. Name the "
            "directory that `hybrid-jax train --out` was given; a run that has just begun records "
            "its first step soon."
        )
    warn = lambda words: print(f"warning: {words}", file=sys.stderr)
    return report.Recorded(
        name=name,
        records=read_metrics(files.metrics),
        config=_config(files.config, warn),
        starts=environment.read(files.environment, warn),
        layers=_lightning_layers(files),
        sources=tuple(source.label for source in _sources(files)),
        lengths=_lengths(files),
    )


def _config(path: pathlib.Path, warn) -> dict[str, str]:
    """As it was written: a report must not depend on what this version's fields are."""
    try:
        return dict(_leaves(yaml.safe_load(path.read_text(encoding="utf-8")), ""))
    except (OSError, ValueError, yaml.YAMLError) as error:
        warn(f"the configuration of {path.parent} is not known: {error}")
        return {}


def _leaves(tree, path: str):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list):
        for idx, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{idx}]")
    else:
        yield path, repr(tree)


def _sources(files):
    try:
        return files.read_config().data.sources
    except (ValueError, OSError):
        return ()


def _lengths(files) -> dict[str, dict]:
    """By source, where its data is still there."""
    from hybrid_jax.data import corpus, read_summary

    found = {}
    for number, source in enumerate(_sources(files)):
        try:
            summary = read_summary(corpus.place_of_source(source, files.tokens, number))
            found[source.label] = summary["lengths"]
        except (ValueError, KeyError):
            continue
    return found


def _lightning_layers(files) -> tuple[int, ...]:
    from hybrid_jax.training.state_norms import layers_of

    try:
        return tuple(layers_of(files.read_config().model))
    except (ValueError, OSError):
        return ()
