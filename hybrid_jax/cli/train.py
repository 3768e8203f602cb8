"""`hybrid-jax train`: train a preset on text files, with every field of a run as an option."""

import dataclasses
import logging
import os
import pathlib
import sys
import typing

import tyro

from hybrid_jax.config import presets, recipes, text
from hybrid_jax.config.data import parse_sources
from hybrid_jax.config.parallel import Parallel
from hybrid_jax.config.start import Start
from hybrid_jax.config.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a run's configuration comes from before single options change it."""

    out: pathlib.Path
    """Directory of the run; new or empty unless --resume is given."""
    preset: str | None = None
    """Model to train: quickstart, nano, ...; `hybrid-jax presets` lists them."""
    recipe: str | None = None
    """How it is trained, as published or our own; `hybrid-jax recipes` lists them. Left out, the
    preset's own."""
    budget: recipes.Budget = recipes.PUBLISHED
    """How much of the recipe is affordable: the rest of it follows in proportion."""
    data: tuple[str, ...] = ()
    """What to learn from, one or more: a directory, a file or a glob of text, JSON Lines, Parquet,
    ArrayRecord or Arrow, a Hugging Face data set on disk, or what `hybrid-jax data prepare` made.
    PATH=WEIGHT gives a share: web=0.7 code=0.3. More about each: --data.sources.0.FIELD."""
    config: pathlib.Path | None = None
    """YAML file with a whole configuration, such as another run's config.yaml."""
    mesh: str | None = None
    """Devices by axis, e.g. data=2,fsdp=4: data, fsdp, expert, sequence, tensor, and slices. Left
    out, all devices are on fsdp."""
    rules: str | None = None
    """What is split over the axes: fsdp, fsdp_tensor, expert, long_context, long_rows or serve."""
    start_from: str | None = None
    """Begin with the weights of this run or checkpoint. The same as --start.path; --start.step and
    --start.moments then say more."""
    resume: bool = False
    """Continue the run in OUT from its newest checkpoint; only --steps, --mesh, --rules and what is
    below --faults and --observation may differ from before."""


@dataclasses.dataclass(frozen=True)
class Args(Source):
    """Train a model on text files, or continue where a run was interrupted.

    Leaves OUT/config.yaml, metrics.jsonl, checkpoints/, loss.png and tokenizer.json; `hybrid-jax
    report OUT` draws them. Ctrl-C and SIGTERM end the run after the step at hand, with a
    checkpoint. Where a field has several kinds, --PATH.kind
    chooses one: --schedule.decay.kind Linear, --loss.balance.kind HuggingFaceBalance. Defaults
    below are those of --preset or --config.

    Several processes train one run if each is started with the same options, OUT on a file system
    that all share, and in its environment JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or SLURM's variables, or those of a TPU pod, of GKE or of several slices.

    Exit code 0: done, or ended by Ctrl-C; 75: ended by SIGTERM, or a step hung: start it again with
    --resume, as the launchers in scripts/launch do; 1: too many updates in a row were skipped, or
    another process ended; 2: bad input, or the last checkpoint could not be written.
    """

    train: typing.Annotated[TrainConfig, tyro.conf.arg(name="")] = tyro.MISSING
    """The whole run."""


def parse(argv: list[str]) -> Args:
    """Options to a complete configuration.

    What --preset, --config or --resume names is the default that every other option changes. Raises
    ValueError or OSError if it cannot be had; exits on a wrong option or --help, as tyro does.
    """
    argv, kinds = _take_kinds(argv)
    asks_help = bool({"-h", "--help"} & set(argv))
    source = _source([arg for arg in argv if arg not in ("-h", "--help")], asks_help)
    tree = text.to_dict(_base(source, asks_help))
    for path, kind in kinds:
        _set_kind(tree, path, kind)
    default = Args(out=tyro.MISSING, train=text.from_dict(TrainConfig, tree))
    return tyro.cli(
        Args,
        args=argv,
        prog="hybrid-jax train",
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )


def run(args: Args) -> int:
    """Train; 0 when done or interrupted, 75 when stopped by SIGTERM, 1 if the run diverged.

    Also 1 if the computation breaks off, as it does when another process ends.
    """
    import jax

    from sharding import processes

    # Before anything asks for a device.
    processes.start()
    from hybrid_jax import training
    from hybrid_jax.training.stop import START_AGAIN

    if "HYBRID_JAX_TRACEBACK" not in os.environ:
        # A checkpoint that cannot be written is one sentence of ours, after 1,400 lines of Orbax's.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    again = f"hybrid-jax train --out {args.out} --resume"
    try:
        outcome = training.train(args.train, args.out, resume=args.resume)
    except training.Diverged as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        processes.part(1)
        if jax.process_count() == 1:
            raise
        print(
            f"failed: {error}\nIf another process ended, its output says why. Continue from the "
            f"newest checkpoint with:\n  {again}",
            file=sys.stderr,
        )
        return 1
    except BaseException as error:
        processes.part(_exit_code(error))
        raise
    code = START_AGAIN if outcome.stopped_by == "SIGTERM" else 0
    if not processes.is_first():
        return code
    if outcome.stopped_by is not None:
        print(
            f"Stopped by {outcome.stopped_by} after step {outcome.step}; nothing is lost. "
            f"Continue with:\n  {again}"
        )
        return code
    print(f"Done: {outcome.step} steps, in {args.out}.")
    if outcome.heldout_loss is not None:
        print(
            f"Held-out loss {outcome.heldout_loss:.4f} nats a token; unigram entropy of the "
            f"held-out tokens {outcome.unigram_entropy:.4f}."
        )
    return 0


def _exit_code(error: BaseException) -> int:
    """As `hybrid_jax.cli` has it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (ValueError, OSError, ModuleNotFoundError)) else 1


def _source(argv: list[str], asks_help: bool) -> Source:
    """The options of `Source`; everything else is read later."""
    if asks_help:
        argv = ["--out", "OUT", *argv]
    source, _ = tyro.cli(
        Source,
        args=argv,
        prog="hybrid-jax train",
        add_help=False,
        return_unknown_args=True,
    )
    return source


def _base(source: Source, asks_help: bool) -> TrainConfig:
    """The configuration that single options change."""
    base = _stored(source, asks_help)
    if source.start_from is not None:
        old_start = base.start or Start(path=source.start_from)
        start = dataclasses.replace(old_start, path=source.start_from)
        base = dataclasses.replace(base, start=start)
    if source.mesh is None and source.rules is None:
        return base
    # As without options: all devices on fsdp.
    old = base.parallel or Parallel(mesh="fsdp=-1")
    parallel = dataclasses.replace(
        old,
        mesh=old.mesh if source.mesh is None else source.mesh,
        rules=old.rules if source.rules is None else source.rules,
    )
    return dataclasses.replace(base, parallel=parallel)


def _stored(source: Source, asks_help: bool) -> TrainConfig:
    """What --preset, --config or --resume names, with --data in its place."""
    if source.resume and not asks_help:
        from hybrid_jax.training.run import RunDirectory

        base = RunDirectory(source.out).read_config()
        if source.preset is not None:
            base = dataclasses.replace(base, model=presets.get(source.preset))
    elif source.config is not None:
        base = text.read_yaml(TrainConfig, source.config)
        if source.preset is not None:
            raise ValueError("Give --preset or --config, not both: each is a whole configuration.")
    else:
        if not asks_help and (source.preset is None or not source.data):
            raise ValueError(
                "A new run needs --preset NAME and --data PATH (or --config FILE); "
                "--resume continues one that is there."
            )
        return _new(source)
    if source.data:
        sources = parse_sources(source.data)
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, sources=sources))
    return base


def _new(source: Source) -> TrainConfig:
    """What --preset, --recipe and --budget mean."""
    preset, sources = source.preset or "nano", parse_sources(source.data or ("DATA",))
    if source.recipe is None:
        return recipes.of_preset(preset, sources, source.budget)
    return recipes.get(source.recipe, presets.get(preset), sources, source.budget)


def _take_kinds(argv: list[str]) -> tuple[list[str], list[tuple[list[str], str]]]:
    """Options without `--PATH.kind VALUE`, and those: (parts of the path, value)."""
    rest, kinds = [], []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--") and option.endswith(".kind"):
            value = value if equals else next(words, "")
            kinds.append((option[2:-5].replace("-", "_").split("."), value))
        else:
            rest.append(word)
    return rest, kinds


def _set_kind(tree: dict, path: list[str], kind: str) -> None:
    """Choose the member of a union at `path`; its fields start at their defaults."""
    try:
        parent = tree
        for part in path[:-1]:
            parent = parent[int(part)] if isinstance(parent, list) else parent[part]
        old = parent[path[-1]]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"There is no field {'.'.join(path)!r} to choose a kind for.") from error
    if kind == "None":
        parent[path[-1]] = None
    elif not isinstance(old, dict) or old["kind"] != kind:
        parent[path[-1]] = {"kind": kind}
