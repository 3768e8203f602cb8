"""`hybrid-jax eval`: perplexity by length, needles, recall and lm_eval's tasks, with pictures."""

import dataclasses
import json
import os
import pathlib
import sys
import time
import typing

import tyro

from hybrid_jax.cli import opened
from hybrid_jax.config import evaluation as settings


@dataclasses.dataclass(frozen=True)
class Args:
    """Evaluate a checkpoint or a training run. Prints tables, and leaves OUT/TASK.json with the
    figures, settings and seed, and OUT/TASK.png.

    Tasks: perplexity (loss by length of the context, on text), quantization (with --quantize: how
    far predictions on that text are from those of the weights as they are stored), needle and
    multi-needle (a number, or several, hidden in text by length and depth), token-needle (the same
    without language), mqar (associative recall by number of pairs), and lm_eval:NAME (a task of
    EleutherAI's harness, with the extra `eval`)."""

    target: typing.Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """Directory of a checkpoint (Hugging Face or Orbax) or of a training run."""
    task: tuple[str, ...]
    """What to measure, one or more of the tasks above."""
    out: pathlib.Path
    """Directory for the results; what an earlier call left of the same tasks is replaced."""
    seed: int = 0
    """Decides everything that is drawn at random."""
    batch_size: int = 8
    """Rows that go through the model together."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: str | None = None
    """Hold the weights of layers in eight bits: int8 (a scale for each output) or fp8 (blocks of
    128x128; a checkpoint's own are kept)."""
    mesh: str | None = None
    """Split the model over all devices, e.g. 'tensor=8' or 'expert=2,tensor=4'; one axis may be -1.
    Without it one device computes."""
    rules: str = "serve"
    """Which mesh axes split which dims; a state takes rules that gather no parameters."""
    include_path: str | None = None
    """Directory with tasks for lm_eval, one YAML file each."""
    limit: int | None = None
    """Most examples of a task of lm_eval."""
    max_length: int | None = None
    """Most tokens of a row for lm_eval; default: the longest context of the model."""
    perplexity: settings.Perplexity = dataclasses.field(default_factory=settings.Perplexity)
    """Loss by length of the context."""
    needle: settings.Needle = dataclasses.field(default_factory=settings.Needle)
    """One sentence in a haystack."""
    multi_needle: settings.MultiNeedle = dataclasses.field(default_factory=settings.MultiNeedle)
    """Several sentences in a haystack."""
    token_needle: settings.TokenNeedle = dataclasses.field(default_factory=settings.TokenNeedle)
    """A key and a value among tokens."""
    mqar: settings.Recall = dataclasses.field(default_factory=settings.Recall)
    """Multi-query associative recall."""


def run(args: Args) -> int:
    """Evaluate; exit code 0. Raises ValueError, OSError or ModuleNotFoundError for bad input."""
    import jax

    from hybrid_jax.cli import eval_tasks
    from hybrid_jax.evaluation import ModelPredictor
    from hybrid_jax.observe.rows import Rows

    # All that can be wrong with the input is, before the model is read or a directory made.
    _check(args)
    directory = opened.directory(args.target)
    tasks = eval_tasks.prepare(args, directory)
    args.out.mkdir(parents=True, exist_ok=True)
    model, placement = opened.model(
        *(directory, args.dtype, args.mesh, args.rules, args.batch_size, args.quantize)
    )
    for task in tasks:
        _note_length(task, model.config)
        predictor = ModelPredictor(
            model, batch_size=args.batch_size, placement=placement, longest=task.longest
        )
        begin = time.monotonic()
        with Rows(task.name, task.rows) as rows:
            figures = task.evaluate(predictor, model.config, rows.advance)
        report = {
            "task": task.name,
            "target": args.target,
            "model": model.config.name,
            "seed": args.seed,
            "dtype": args.dtype,
            "quantize": args.quantize,
            **opened.weights(model),
            "batch_size": args.batch_size,
            "settings": task.settings,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.monotonic() - begin, 1),
        } | figures
        _store(args.out, task, report, f"{model.config.name}: {task.name}")
    return 0


def _store(out: pathlib.Path, task, report: dict, title: str) -> None:
    """Write the report and its picture, and print it."""
    file = out / f"{task.name}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    written = [file]
    if task.draw is not None:
        written.append(out / f"{task.name}.png")
        task.draw(report, written[-1], title=title)
    names = " and ".join(str(path) for path in written)
    print("\n".join([title, *task.lines(report), f"[{report['seconds']} s; {names}]", ""]))


def _note_length(task, config) -> None:
    if task.longest is not None and task.longest > config.max_positions:
        print(
            f"note: {task.name} goes to {task.longest:,} tokens; {config.name} is published for "
            f"{config.max_positions:,}.",
            file=sys.stderr,
        )


def _check(args: Args) -> None:
    """ValueError for numbers out of range and an --out that cannot be a directory."""
    for name in ("batch_size", "limit", "max_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if args.quantize is not None:
        from hybrid_jax.model import quantized

        quantized.check_scheme(args.quantize)
    if not 0 <= args.seed < 1 << 32:
        raise ValueError(f"--seed must be in [0, 2**32); got {args.seed}.")
    if args.out.exists() and not (args.out.is_dir() and os.access(args.out, os.W_OK)):
        raise ValueError(f"--out {args.out} is no directory to write to; choose another one.")
