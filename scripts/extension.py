"""A tiny context extension through the three stages of MiniMax-Text-01, and what it is good for.

The hybrid of scripts/evidence.py learns to recall within 128 tokens, and is then taken through the
recipes text-01-128k, text-01-512k and text-01-1m, each at 1/512 of its length: rows of 256,
1,024 and 2,048 tokens, each stage with its rotary base and its mixture of short, medium and long
documents. Maps of needles are drawn before and after each stage. What is finished is not run again.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tyro

import hybrid_jax
from hybrid_jax import data, training
from hybrid_jax.config import evaluation as asked
from hybrid_jax.config import recipes
from hybrid_jax.config import training as t
from hybrid_jax.config.data import Source
from hybrid_jax.data.recall import needles
from hybrid_jax.evaluation import ModelPredictor, token_needle
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from scripts import evidence, evidence_plots

STAGES = (("text-01-128k", 256), ("text-01-512k", 1024), ("text-01-1m", 2048))
BASE_LENGTH = 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
# Documents of the stages, in tokens: some in each of their buckets (below 64, to 256, above).
DOCUMENTS = ((24, 63, 4000), (64, 256, 3000), (257, 2048, 2400))
DATA_SEED = 7


@dataclasses.dataclass(frozen=True)
class Args:
    """Train a base model, take it through three stages, and ask it for needles all the while."""

    out: pathlib.Path = pathlib.Path("runs/extension")
    """Directory for the runs, summary.json and the picture."""
    base_steps: int = 1200
    """Updates of the base model, of 4,096 tokens."""
    stage_tokens: float = 5e6
    """Tokens of each stage."""
    learning_rate: float = 2e-3
    """Of the stages; the recipe's 3e-5 is for a model of 456B parameters."""
    samples: int = 32
    """Needles asked for at each length and depth."""


def documents(shortest: int, longest: int, count: int, first: int) -> Iterator[data.Encoded]:
    """Documents of `shortest` to `longest` tokens, numbered from `first`."""
    for row in range(first, first + count):
        rng = np.random.default_rng([DATA_SEED, row])
        length = int(rng.integers(shortest, longest + 1))
        make = _recall if length <= BASE_LENGTH else _needles
        ids, learned = make(rng, length, row)
        yield data.Encoded(str(row), str(row), ids.astype(np.uint32), learned)


def _recall(rng, length: int, row: int):
    """Pairs of a key and its value, then keys again and their values, which are learned."""
    pairs = int(rng.integers(4, min(32, length // 4) + 1))
    keys = 1 + rng.permutation(evidence.VOCAB // 2 - 1)[:pairs]
    values = evidence.VOCAB // 2 + rng.permutation(evidence.VOCAB // 2)[:pairs]
    asked_for = rng.integers(pairs, size=(length - 2 * pairs) // 2)
    which = np.concatenate([np.arange(pairs), asked_for])
    ids = np.stack([keys[which], values[which]], axis=1).reshape(-1)
    place = np.arange(len(ids))
    return ids, (place >= 2 * pairs) & (place % 2 == 1)


def _needles(rng, length: int, row: int):
    """Needles in filler, asked for at the end, where their values are learned."""
    hidden = int(rng.integers(4, 17))
    depths = (tuple(rng.random(hidden)),)
    made = needles(DATA_SEED, depths, length - 1, evidence.VOCAB, first_row=row)
    # The last answer is no input of a row, but the last token of a document.
    ids = np.append(made.tokens_BT[0], made.targets_BT[0, -1])
    return ids, np.append(False, made.weights_BT[0] > 0)


def prepare(out: pathlib.Path) -> tuple[Source, Source]:
    """The base model's data and that of the stages."""
    # Its ids stand for nothing: what is stored has ids of its own, below 128.
    tokenizer = data.train_tokenizer(["none"], 257)
    base, stages = out / "data" / "base", out / "data" / "stages"
    if not data.is_dataset(base):
        made = documents(BASE_LENGTH, BASE_LENGTH, 20_000, 0)
        data.store_tokens(made, base, tokenizer, heldout_fraction=0.01)
    if not data.is_dataset(stages):
        made = (
            document
            for idx, (shortest, longest, count) in enumerate(DOCUMENTS)
            for document in documents(shortest, longest, count, (idx + 1) * 100_000)
        )
        data.store_tokens(made, stages, tokenizer, heldout_fraction=0.01)
    return Source(path=str(base), name="base"), Source(path=str(stages), name="documents")


def train(config: t.TrainConfig, run: pathlib.Path) -> None:
    """Begin or go on; nothing if it is done."""
    resume = (run / "config.yaml").is_file()
    training.train(config, run, resume=resume)


def base_config(source: Source, args: Args) -> t.TrainConfig:
    """The base model's run, which starts as those of scripts/evidence.py do."""
    config = recipes.get(
        "default",
        dataclasses.replace(evidence.model_config("hybrid"), vocab_size=257),
        (source,),
        recipes.Budget(length=BASE_LENGTH, batch_tokens=32 * BASE_LENGTH),
    )
    return dataclasses.replace(
        config,
        steps=args.base_steps,
        schedule=t.Schedule(peak=5e-3, warmup_steps=50),
        loss=t.Loss(balance=None),
        start=t.Start(path=str(args.out / "start")),
    )


def make_start(config: t.TrainConfig, directory: pathlib.Path) -> None:
    """Embeddings of standard deviation one with equal halves, for the base model to begin with."""
    if directory.exists():
        return
    skeleton = Skeleton(config.model)
    state = evidence.start(config, skeleton, Optimizer(config, skeleton.axes))
    hybrid_jax.save(skeleton.model(state.params), directory, format="orbax")


def stage_config(name: str, length: int, model, source: Source, args: Args, start) -> t.TrainConfig:
    """A published stage at this size."""
    budget = recipes.Budget(length=length, batch_tokens=4096, tokens=args.stage_tokens)
    config = recipes.get(name, model, (source,), budget)
    return dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, peak=args.learning_rate),
        loss=t.Loss(balance=None),
        start=t.Start(path=str(start)),
    )


def ask(run: pathlib.Path, args: Args) -> list[dict]:
    """The map of needles of a run's last model."""
    model = training.restore_model(run)
    wanted = asked.TokenNeedle(
        lengths=LENGTHS, value_length=1, samples=args.samples, vocab_size=evidence.VOCAB
    )
    predictor = ModelPredictor(model, batch_size=8)
    return token_needle.evaluate(predictor, wanted, evidence.EVALUATION_SEED)["cells"]


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    base_source, stage_source = prepare(args.out)
    base = base_config(base_source, args)
    make_start(base, args.out / "start")
    train(base, args.out / "base")
    maps = {"before": ask(args.out / "base", args)}
    before = args.out / "base"
    for name, length in STAGES:
        config = stage_config(name, length, base.model, stage_source, args, before)
        before = args.out / name
        print(f"{name}: rows of {length} tokens, {config.steps} steps.", flush=True)
        train(config, before)
        maps[f"after {name}"] = ask(before, args)
    summary = {"settings": json.loads(json.dumps(dataclasses.asdict(args), default=str))}
    (args.out / "summary.json").write_text(json.dumps(summary | {"maps": maps}, indent=2) + "\n")
    evidence_plots.draw_maps(maps, args.out / "needles.png")
    for name, cells in maps.items():
        found = {
            length: np.mean([cell["exact"] for cell in cells if cell["length"] == length])
            for length in LENGTHS
        }
        print(f"{name:>20}  " + "   ".join(f"{n}: {share:.2f}" for n, share in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
