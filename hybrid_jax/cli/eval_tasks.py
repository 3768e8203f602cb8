"""The tasks of `hybrid-jax eval`: what each needs, computes, prints and draws."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from hybrid_jax.checkpoint.formats.training_run import is_training_run
from hybrid_jax.cli import opened
from hybrid_jax.config.text import near_names
from hybrid_jax.evaluation import comparison, grids, needle, perplexity, plots, recall, token_needle

LM_EVAL = "lm_eval"


@dataclasses.dataclass(frozen=True)
class Task:
    """One evaluation, ready to run."""

    name: str
    """Of its files too."""
    settings: dict
    """What was asked for, as stored with the figures."""
    rows: int | None
    """Rows it will tick off, if that is known."""
    longest: int | None
    """Bound on the tokens of a row, if there is one."""
    evaluate: Callable
    """(predictor, model's config, tick) -> figures."""
    lines: Callable[[dict], list[str]]
    """Figures for a reader."""
    draw: Callable | None
    """(figures, path, title=) writes a PNG; None: there is nothing to see."""


def prepare(args, directory: pathlib.Path) -> list[Task]:
    """The tasks that `args` (of `hybrid-jax eval`) name, with their texts read.

    Raises ValueError for an unknown task, a missing tokenizer, or text that does not do.
    """
    tokenizer = opened.tokenizer(directory)
    tasks, harness_names = [], []
    for name in dict.fromkeys(args.task):
        kind, _, harness_name = name.partition(":")
        if kind == LM_EVAL and harness_name:
            harness_names.append(harness_name)
        elif name in _MAKE:
            tasks.append(_MAKE[name](args, directory, tokenizer))
        else:
            known = (*_MAKE, f"{LM_EVAL}:NAME")
            raise ValueError(
                f"There is no task {name!r}; there are {', '.join(known)}.{near_names(name, known)}"
            )
    if harness_names:
        tasks.append(_harness(args, directory, tokenizer, harness_names))
    if not tasks:
        raise ValueError("Name at least one --task.")
    return tasks


def _perplexity(args, directory, tokenizer) -> Task:
    wanted = args.perplexity
    store = _text(wanted, directory, tokenizer)
    return Task(
        "perplexity",
        dataclasses.asdict(wanted),
        perplexity.num_rows(store, wanted),
        max(wanted.lengths),
        lambda predictor, config, tick: perplexity.evaluate(predictor, store, wanted, tick),
        perplexity.lines,
        plots.draw_perplexity,
    )


def _quantization(args, directory, tokenizer) -> Task:
    if args.quantize is None:
        raise ValueError(
            "The task quantization compares quantised weights with those that are stored; say with "
            "--quantize int8 or fp8 which."
        )
    wanted = args.perplexity
    store = _text(wanted, directory, tokenizer)

    def evaluate(predictor, config, tick) -> dict:
        reference, placement = opened.model(
            directory, args.dtype, args.mesh, args.rules, rows=args.batch_size
        )
        pair = comparison.Comparison(
            *(reference, predictor.model), batch_size=args.batch_size, placement=placement
        )
        return comparison.evaluate(pair, store, wanted, tick)

    longest = max(wanted.lengths)
    rows = perplexity.rows_at(perplexity.chosen(store, wanted), longest)
    settings = dataclasses.asdict(wanted)
    return Task("quantization", settings, rows, longest, evaluate, comparison.lines, None)


def _text(wanted, directory: pathlib.Path, tokenizer):
    """The tokens that --perplexity means."""
    if wanted.text is not None:
        tokenizer = _needed(tokenizer, directory, "perplexity on a text")
        end_id = opened.end_id(tokenizer)
        return perplexity.tokenised(wanted.text, wanted.pattern, tokenizer, end_id, wanted.tokens)
    heldout = _heldout(directory) if is_training_run(directory) else []
    if not heldout:
        raise ValueError(
            f"{directory} has no held-out text of its own; give one with --perplexity.text PATH."
        )
    from hybrid_jax.data import TokenStore

    return TokenStore.joined(heldout)


def _heldout(directory: pathlib.Path) -> list:
    """What each source of a run holds out."""
    from hybrid_jax.training.run import RunDirectory, load_tokens

    run = RunDirectory(directory)
    parts = load_tokens(run.read_config(), run)
    return [part.heldout for part in parts if part.heldout is not None]


def _needle(args, directory, tokenizer) -> Task:
    wanted, tokenizer = args.needle, _needed(tokenizer, directory, "needle")
    # Each prompt is continued, and its answer scored.
    rows = 2 * len(wanted.lengths) * len(wanted.depths) * wanted.samples
    return Task(
        "needle",
        dataclasses.asdict(wanted),
        rows,
        max(wanted.lengths),
        lambda predictor, config, tick: needle.evaluate(
            predictor, tokenizer, wanted, args.seed, tick
        ),
        functools.partial(_grid_lines, row="depth", values=("exact", "forced", "logprob")),
        functools.partial(_draw_grid, row="depth", columns=("exact", "logprob")),
    )


def _multi_needle(args, directory, tokenizer) -> Task:
    wanted, tokenizer = args.multi_needle, _needed(tokenizer, directory, "multi-needle")
    rows = 2 * len(wanted.lengths) * len(wanted.counts) * wanted.samples
    return Task(
        "multi-needle",
        dataclasses.asdict(wanted),
        rows,
        max(wanted.lengths),
        lambda predictor, config, tick: needle.evaluate_many(
            predictor, tokenizer, wanted, args.seed, tick
        ),
        functools.partial(_grid_lines, row="count", values=("exact", "forced", "logprob")),
        functools.partial(_draw_grid, row="count", columns=("exact", "logprob")),
    )


def _token_needle(args, directory, tokenizer) -> Task:
    wanted = args.token_needle
    return Task(
        "token-needle",
        dataclasses.asdict(wanted),
        len(wanted.lengths) * len(wanted.depths) * wanted.samples,
        max(wanted.lengths),
        lambda predictor, config, tick: token_needle.evaluate(predictor, wanted, args.seed, tick),
        functools.partial(_grid_lines, row="depth", values=("exact", "tokens", "logprob")),
        functools.partial(_draw_grid, row="depth", columns=("exact", "logprob")),
    )


def _mqar(args, directory, tokenizer) -> Task:
    wanted = args.mqar
    return Task(
        "mqar",
        dataclasses.asdict(wanted),
        len(wanted.pairs) * wanted.rows,
        wanted.length,
        lambda predictor, config, tick: recall.evaluate(predictor, wanted, args.seed, tick),
        recall.lines,
        plots.draw_recall,
    )


def _harness(args, directory, tokenizer, names: list[str]) -> Task:
    tokenizer = _needed(tokenizer, directory, "lm_eval")
    try:
        from hybrid_jax.evaluation import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != LM_EVAL:
            raise
        raise ModuleNotFoundError(
            "Tasks of lm_eval need the package lm_eval, which is not installed. Install the extra: "
            "pip install 'hybrid-jax[eval]'."
        ) from error

    def evaluate(predictor, config, tick) -> dict:
        model = harness.HarnessModel(
            predictor, tokenizer, end_id=opened.end_id(tokenizer),
            max_length=args.max_length or config.max_positions, seed=args.seed, tick=tick,
        )  # fmt: skip
        return harness.evaluate(
            model, names, include_path=args.include_path, limit=args.limit, seed=args.seed
        )

    settings = {"tasks": names} | {
        name: getattr(args, name) for name in ("include_path", "limit", "max_length")
    }
    return Task(LM_EVAL, settings, None, None, evaluate, harness.lines, None)


_MAKE = {
    "perplexity": _perplexity,
    "quantization": _quantization,
    "needle": _needle,
    "multi-needle": _multi_needle,
    "token-needle": _token_needle,
    "mqar": _mqar,
}


def _needed(tokenizer, directory: pathlib.Path, what: str):
    if tokenizer is None:
        raise ValueError(
            f"{directory} has no tokenizer.json, which {what} needs. Put the model's tokenizer "
            "there, or choose token-needle or mqar, which need none."
        )
    return tokenizer


def _grid_lines(report: dict, *, row: str, values) -> list[str]:
    return [line for value in values for line in grids.lines(report["cells"], row, "length", value)]


def _draw_grid(report: dict, path, *, row: str, columns, title: str) -> None:
    plots.draw_grid(report["cells"], path, row=row, columns=columns, title=title)
