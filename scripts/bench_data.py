"""Times the data pipeline: tokenising, packing, and rows alone, beside the model that eats them.

The Python standard library is tokenised by one process and by several, packed in every way into
rows of 4096 tokens, and read as batches of the quickstart; then the quickstart's training step is
timed on batches from the same pipeline, in turn with the pipeline alone. Recorded in
docs/benchmarks/data.md:

    python -m scripts.bench_data [--steps 6] [--json OUT]
"""

import argparse
import json
import os
import pathlib
import statistics
import sysconfig
import tempfile
import time

import jax

from hybrid_jax import data
from hybrid_jax.cli.huge_pages import restart_with_huge_pages
from hybrid_jax.config import recipes
from hybrid_jax.config.data import Aligned, Concatenate, FirstFit, Source
from hybrid_jax.data import corpus
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import initial_state
from hybrid_jax.training.step import make_train_step

# Test suites would be half of it.
_EXCLUDE = ("test/*", "*/test/*", "*/tests/*", "site-packages/*", "idlelib/*")
_LENGTH = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=6, help="training steps to time")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args()
    source = Source(
        path=sysconfig.get_paths()["stdlib"], name="stdlib", pattern="*.py", exclude=_EXCLUDE
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(source, pathlib.Path(folder), args.steps)
    for name, value in figures.items():
        print(f"{name:<46} {value:>16,.4g}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(source: Source, folder: pathlib.Path, steps: int) -> dict[str, float]:
    """Every figure by name; rates in tokens/s."""
    recipe = recipes.of_preset("quickstart", (source,))
    tokenizer = corpus.make_tokenizer(
        (source,), recipe.model.vocab_size, recipe.data.heldout_fraction, print
    )
    figures: dict[str, float] = {}
    for workers in (0, os.cpu_count() or 1):
        begin = time.perf_counter()
        made = data.prepare(source, folder / str(workers), tokenizer, num_workers=workers)
        seconds = time.perf_counter() - begin
        figures[f"tokenising with {workers} workers"] = made.summary["tokens"] / seconds
    for packing in (Concatenate(), FirstFit(), Aligned()):
        name = type(packing).__name__
        begin = time.perf_counter()
        windows = data.WindowIndex(made.training, _LENGTH, 0, packing)
        figures[f"{name} at {_LENGTH}: efficiency"] = windows.efficiency
        figures[f"{name} at {_LENGTH}: seconds to pack"] = time.perf_counter() - begin
    return figures | _beside_training(recipe, made, steps)


def _beside_training(recipe, made: data.Dataset, steps: int) -> dict[str, float]:
    """The pipeline's rate beside the model's, in turn."""
    length, size = recipe.data.sequence_length, recipe.batch_size
    windows = data.WindowIndex(made.training, length, recipe.seed)
    batches = data.Batches(
        [windows], recipe.data.sources, lambda step: size, seed=0, steps=recipe.steps
    )
    skeleton = Skeleton(recipe.model)
    optimizer = Optimizer(recipe, skeleton.axes)
    state = initial_state(recipe, skeleton, optimizer)
    train_step = make_train_step(recipe, skeleton, optimizer)
    state, metrics = train_step(state, next(batches))
    jax.block_until_ready(metrics)
    alone, trained = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        for _ in range(50):
            batch = next(batches)
        alone.append(50 * size * length / (time.perf_counter() - begin))
        begin = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        trained.append(size * length / (time.perf_counter() - begin))
    pipeline, model = statistics.median(alone), statistics.median(trained)
    return {
        "pipeline alone": pipeline,
        "quickstart training": model,
        "pipeline over training": pipeline / model,
    }


if __name__ == "__main__":
    restart_with_huge_pages()
    raise SystemExit(main())
