"""Does the hybrid retrieve where lightning attention alone does not? Small runs, on any machine.

Trains softmax only, lightning only, and the hybrid (softmax last) at the same size, on the same
data, for as many steps, from several seeds each. Asks each for what it was shown, at its own length
and beyond it, times a step against length, and draws what comes out. A run whose results are there
already is not run again.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from hybrid_jax.config import evaluation as asked
from hybrid_jax.config import layers
from hybrid_jax.config import training as t
from hybrid_jax.config.data import text
from hybrid_jax.config.model import ModelConfig, fold_layers
from hybrid_jax.data import Batch
from hybrid_jax.data.recall import associative_recall
from hybrid_jax.evaluation import ModelPredictor, recall, token_needle
from hybrid_jax.observe import Progress
from hybrid_jax.training.optimizer import Optimizer
from hybrid_jax.training.parameters import Skeleton
from hybrid_jax.training.state import TrainState, initial_state
from hybrid_jax.training.step import make_train_step
from scripts import evidence_plots

VARIANTS = {"softmax": "SS", "lightning": "LL", "hybrid": "LS"}
VOCAB, WIDTH, HEADS, HEAD_DIM = 128, 32, 2, 16
# Pairs of a training row; each row draws one of them.
PAIRS = (8, 16, 32)
# Beyond every seed of a run, so that no row is trained on and asked for.
EVALUATION_SEED = 1 << 20


@dataclasses.dataclass(frozen=True)
class Args:
    """Train and ask three small models, from several seeds each; draw what comes out."""

    out: pathlib.Path = pathlib.Path("runs/evidence")
    """Directory for one JSON a run, summary.json and the pictures."""
    steps: int = 1200
    """Updates of each run; never fewer for a run that does well."""
    seeds: int = 3
    """Runs of each model, with the seeds 0, 1, ..."""
    length: int = 128
    """Tokens of a training row."""
    batch_size: int = 32
    """Rows an update."""
    learning_rate: float = 5e-3
    """Peak of the schedule: 50 steps of warm-up, then half a cosine down to a tenth."""
    rows: int = 64
    """Rows of each question asked of a trained model."""
    stretch: tuple[int, ...] = (1, 2, 4, 8)
    """Lengths at which a trained model is asked, as multiples of `length`."""
    timed_lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    """Lengths at which a step of about 8,192 tokens is timed."""


def model_config(variant: str) -> ModelConfig:
    """Two layers of one kind or of both, about 40,000 parameters, pre-norm, dense.

    Every model sees the previous token's embedding in half of its channels: without that, what is
    learned first is to look one token back, and only the layers decide when (Zoology gives every
    model a short convolution for it).
    """
    mixers: dict[str, layers.Mixer] = {
        "L": layers.LightningAttention(num_heads=HEADS, head_dim=HEAD_DIM),
        "S": layers.SoftmaxAttention(
            num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM // 2,
            rope_theta=1e4,
        ),
    }  # fmt: skip
    # Three matrices that hold what two of four times the width would.
    ffn = layers.DenseFfn(hidden_dim=WIDTH * 8 // 3)
    residual = layers.Residual(source="input")
    pattern, repeats = fold_layers(
        layers.Layer(mixer=mixers[kind], ffn=ffn, residual=residual) for kind in VARIANTS[variant]
    )
    return ModelConfig(
        name=variant, vocab_size=VOCAB, hidden_dim=WIDTH, pattern=pattern, repeats=repeats,
        norm_eps=1e-5, shift_embeddings=True, initializer_range=WIDTH**-0.5, max_positions=1 << 20,
        scan_layers=False,
    )  # fmt: skip


def train_config(variant: str, args: Args, seed: int) -> t.TrainConfig:
    """How a variant is trained; nothing in it depends on the variant but the model."""
    return t.TrainConfig(
        model=model_config(variant), data=text("made up", sequence_length=args.length),
        steps=args.steps, batch_size=args.batch_size, seed=seed,
        schedule=t.Schedule(peak=args.learning_rate, warmup_steps=50), loss=t.Loss(balance=None),
    )  # fmt: skip


def batch(seed: int, step: int, rows: int, length: int) -> Batch:
    """Training rows of one update: the same for every variant."""
    pairs = np.random.default_rng([seed, step]).choice(PAIRS, rows)
    made = associative_recall(seed, pairs.tolist(), length, VOCAB, first_row=step * rows)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), made.tokens_BT.shape)
    return Batch(made.tokens_BT, made.targets_BT, None, positions, made.weights_BT)


def start(config: t.TrainConfig, skeleton: Skeleton, optimizer: Optimizer) -> TrainState:
    """The first state, with embeddings of standard deviation one and equal halves.

    From small ones the softmax layer of a hybrid may never begin to be used. The first half of a
    token's embedding is what its own place sees, the second what the next place does: where both
    are alike, a key looks the same behind its value and in a question, and models need not learn
    first, for half of their steps, that the two are one.
    """
    state = initial_state(config, skeleton, optimizer)
    table = state.params["embedding.table"] / jnp.float32(config.model.initializer_range)
    half = table[:, : table.shape[1] // 2]
    params = state.params | {"embedding.table": jnp.concatenate([half, half], axis=1)}
    return dataclasses.replace(state, params=params)


def run(variant: str, seed: int, args: Args) -> dict:
    """Train one model and ask it; everything that came out."""
    config = train_config(variant, args, seed)
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    step = make_train_step(config, skeleton, optimizer)
    state = start(config, skeleton, optimizer)
    losses, begin = [], time.monotonic()
    with Progress() as progress:
        progress.start(0, args.steps)
        progress.note(f"{variant}, seed {seed}:")
        for k in range(args.steps):
            state, metrics = step(state, batch(seed, k, args.batch_size, args.length))
            losses.append(float(metrics["loss"]))
            tokens = args.batch_size * args.length * (k + 1)
            progress.update(k + 1, losses[-1], tokens / (time.monotonic() - begin))
    model = skeleton.model(state.params)
    return {
        "variant": variant,
        "seed": seed,
        "settings": _settings(args),
        "parameters": sum(int(np.prod(x.shape)) for x in state.params.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "losses": losses,
    } | ask(model, args)


def ask(model, args: Args) -> dict:
    """Recall by pairs at the training length, by length, and the map of needles."""
    predictor = ModelPredictor(model, batch_size=32)
    lengths = tuple(args.length * times for times in args.stretch)
    by_pairs = recall.evaluate(
        predictor,
        asked.Recall(pairs=(4, *PAIRS), length=args.length, rows=args.rows),
        EVALUATION_SEED,
    )
    by_length = []
    for length in lengths:
        wanted = asked.Recall(pairs=PAIRS[-1:], length=length, rows=args.rows)
        by_length.append(
            {"length": length} | recall.evaluate(predictor, wanted, EVALUATION_SEED)["pairs"][0]
        )
    wanted = asked.TokenNeedle(lengths=lengths, value_length=1, samples=max(1, args.rows // 4))
    needles = token_needle.evaluate(predictor, wanted, EVALUATION_SEED)
    return {"pairs": by_pairs["pairs"], "lengths": by_length, "needles": needles["cells"]}


def throughput(args: Args) -> dict:
    """Tokens a second of the whole update, by length: medians of five rounds, compiled before.

    The models take turns, so that whatever else the machine does meets all of them.
    """
    rates: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for length in args.timed_lengths:
        rows = max(1, 8192 // length)
        sized = dataclasses.replace(args, length=length, batch_size=rows)
        made = batch(0, 0, rows, length)
        updates = {variant: _update(train_config(variant, sized, 0), made) for variant in VARIANTS}
        seconds: dict[str, list[float]] = {
            variant: [update()] for variant, update in updates.items()
        }
        for _ in range(5):
            for variant, update in updates.items():
                seconds[variant].append(update())
        for variant, own in seconds.items():
            rate = round(rows * length / statistics.median(own[1:]))
            print(f"{variant}: {rate:,} tokens/s at {length:,}", flush=True)
            rates[variant].append({"length": length, "rows": rows, "tokens_per_second": rate})
    return {"settings": _settings(args), "rates": rates}


def _update(config: t.TrainConfig, made: Batch):
    """One update on `made`, again and again: a function that returns the seconds it took."""
    skeleton = Skeleton(config.model)
    optimizer = Optimizer(config, skeleton.axes)
    step = make_train_step(config, skeleton, optimizer)
    state = start(config, skeleton, optimizer)

    def update() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(state, made)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    return update


def stored(file: pathlib.Path, args: Args, make) -> dict:
    """What `file` holds if it was made with the same settings, else what `make()` does."""
    if file.is_file():
        found = json.loads(file.read_text())
        if found["settings"] == _settings(args):
            print(f"{file} is there; not run again.", flush=True)
            return found
    made = make()
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(made) + "\n")
    beside.replace(file)
    return made


def summary(runs: list[dict], rates: dict[str, list[dict]]) -> dict:
    """Lowest, median and highest over the seeds, by variant."""
    found = {}
    for variant in VARIANTS:
        own = [each for each in runs if each["variant"] == variant]
        found[variant] = {
            "parameters": own[0]["parameters"],
            "recall_by_pairs": {
                str(pairs["pairs"]): _spread(r["pairs"][idx]["recall"] for r in own)
                for idx, pairs in enumerate(own[0]["pairs"])
            },
            "recall_by_length": {
                str(length["length"]): _spread(r["lengths"][idx]["recall"] for r in own)
                for idx, length in enumerate(own[0]["lengths"])
            },
            "needles_by_length": {
                str(length): _spread(evidence_plots.needle_share(r, length) for r in own)
                for length in sorted({cell["length"] for cell in own[0]["needles"]})
            },
            "final_loss": _spread(statistics.mean(r["losses"][-20:]) for r in own),
            "rates": rates[variant],
        }
    return found


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        stored(args.out / f"{variant}-{seed}.json", args, lambda v=variant, s=seed: run(v, s, args))
        for seed in range(args.seeds)
        for variant in VARIANTS
    ]
    evidence_plots.draw_runs(runs, args.out)
    rates = stored(args.out / "rates.json", args, lambda: throughput(args))["rates"]
    found = summary(runs, rates)
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    evidence_plots.draw_rates(rates, args.out)
    for name in ("recall_by_pairs", "recall_by_length", "needles_by_length"):
        print(f"\n{name.replace('_', ' ')} (lowest, median and highest of {args.seeds} seeds)")
        for variant, each in found.items():
            cells = "   ".join(
                f"{key}: {low:.2f} {middle:.2f} {high:.2f}"
                for key, (low, middle, high) in each[name].items()
            )
            print(f"{variant:>10}  {cells}")
    return 0


def _spread(values) -> list[float]:
    values = sorted(values)
    return [values[0], statistics.median(values), values[-1]]


def _settings(args: Args) -> dict:
    """What decides a result; as JSON gives it back."""
    decides = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "seeds")}
    return json.loads(json.dumps(decides | {"pairs": PAIRS, "vocab": VOCAB, "width": WIDTH}))


if __name__ == "__main__":
    sys.exit(main())
