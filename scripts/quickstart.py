"""From the Python standard library's own source to a trained, exported and compared model.

Trains a tokenizer and the `quickstart` model, interrupts that once and resumes it, exports to
Hugging Face safetensors, and asks transformers whether it computes the same. Exit code 1 if the
model did not learn enough or the two disagree.
"""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

import numpy as np
import tyro

import hybrid_jax
from hybrid_jax import data, observe
from hybrid_jax.checkpoint import manifest
from hybrid_jax.config import recipes
from hybrid_jax.config.data import parse_sources
from hybrid_jax.data.tokenizer import write_hugging_face
from hybrid_jax.parity import measure, oracles, ours, report
from hybrid_jax.parity import run as parity
from hybrid_jax.training.run import RunDirectory

# Held-out loss over unigram entropy that must be reached, and steps that reach it with a margin.
TARGET, FEWEST_STEPS = 0.85, 220
# Other people's packages, tests, an IDE, and tables that programs wrote.
NOT_WANTED = ["site-packages/*", "test/*", "*/test/*", "*/tests/*", "idlelib/*"]
NOT_WANTED += ["encodings/*", "pydoc_data/*"]
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n        self."


@dataclasses.dataclass(frozen=True)
class Args:
    """Train on the standard library, interrupt, resume, export, compare with transformers."""

    out: pathlib.Path = pathlib.Path("runs/quickstart")
    """Directory of the run; what an earlier quickstart left there is replaced."""
    minutes: float = 5.0
    """Time for training; a slow machine takes fewer steps, but never too few to learn."""
    steps: int | None = None
    """Exactly so many steps instead."""


def main() -> int:
    args, begin = tyro.cli(Args), time.monotonic()

    def say(words: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        print(f"\n[{minutes}:{seconds:02d}] {words}", flush=True)

    run, export = args.out, args.out / "export"
    if strange := foreign(run):
        raise SystemExit(f"{run} is no run, it is or holds {strange}; choose another --out.")
    shutil.rmtree(run, ignore_errors=True)
    corpus = sysconfig.get_paths()["stdlib"]
    steps = args.steps or recipes.of_preset("quickstart", parse_sources([corpus])).steps
    say("Training on the Python standard library; interrupted, on purpose, before it is done.")
    new = ["--preset", "quickstart", "--steps", str(steps), "--data", corpus]
    new += ["--data.sources.0.pattern", "*.py", "--data.sources.0.exclude", *NOT_WANTED]
    train(run, new, max(1, min(30, steps // 4)))
    if args.steps is None:
        seconds = [record["seconds"] for record in observe.read_metrics(run / "metrics.jsonl")]
        affordable = int(args.minutes * 60 / statistics.median(seconds))
        steps = min(steps, max(affordable, FEWEST_STEPS))
    say(f"Resuming where it was interrupted, for {steps} steps in all.")
    train(run, ["--resume", "--steps", str(steps)])

    say("Exporting to Hugging Face safetensors.")
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    with tempfile.TemporaryDirectory() as beside:
        # What is put into the export afterwards, its manifest does not know.
        write_hugging_face(tokenizer, beside)
        hybrid_jax.save(hybrid_jax.load(run), export, format="hf", sidecars=beside)
    manifest.verify(export)
    dataset = data.open_dataset(run / "tokens" / "00")
    heldout = data.WindowIndex(dataset.heldout, 256, seed=None)
    say("Loading the export again, and continuing a prompt.")
    agree = compare(export, tokenizer, heldout)

    loss = observe.read_metrics(run / "metrics.jsonl")[-1]["heldout_loss"]
    entropy = data.unigram_entropy(heldout.all_targets())
    verdict = "reached" if loss <= TARGET * entropy else "MISSED"
    say(f"The run is {run}, its loss curve {run / 'loss.png'}, the export {export}.")
    print(f"Held-out loss {loss:.4f} nats a token, unigram entropy {entropy:.4f} nats a token:")
    print(f"ratio {loss / entropy:.3f}; {TARGET} or less was to be reached: {verdict}.")
    return 0 if agree and verdict == "reached" else 1


def foreign(run: pathlib.Path) -> str | None:
    """What forbids to replace `run`: itself if it is a file, or a name in it that no run makes."""
    if not run.exists() or (run / "config.yaml").exists():
        return None
    if not run.is_dir():
        return "a file"
    # Whatever a killed run, or a killed removal of one, may leave.
    own = {path.name for path in RunDirectory(run).contents} | {"export"}
    names = (path.name for path in run.iterdir())
    return next((name for name in names if name.removesuffix(".new") not in own), None)


def train(run: pathlib.Path, options: list[str], interrupt_at: int | None = None) -> None:
    """`hybrid-jax train` as its own process, sent what Ctrl-C sends after `interrupt_at` steps."""
    # -P, or modules of the folder this is called from would be found before the installed ones.
    command = [sys.executable, "-P", "-m", "hybrid_jax.cli", "train", "--out", str(run), *options]
    process = subprocess.Popen(command)
    while interrupt_at is not None and process.poll() is None:
        if len(observe.read_metrics(run / "metrics.jsonl")) >= interrupt_at:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise SystemExit(f"Interrupted. `{' '.join(command[:7])} --resume` continues.") from None
    if code:
        raise SystemExit(code)


def compare(export: pathlib.Path, tokenizer: data.Tokenizer, heldout: data.WindowIndex) -> bool:
    """Print what both sides make of a held-out window and of a prompt; False if logits differ."""
    here = ours.Ours(export)
    prompt_1T = np.array([tokenizer.encode(PROMPT)])
    print(f"hybrid-jax:\n{PROMPT}{tokenizer.decode(here.greedy(prompt_1T, 48)[0])}")
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        print("Left out: the same in transformers, for PyTorch is not installed (see the README).")
        return True
    there, notes = oracles.choose(export)
    text = tokenizer.decode(there.greedy(prompt_1T, 48)[0])
    print(f"\n{there.name}:\n{PROMPT}{text}", *notes, sep="\n")
    # Not a window in which two experts are as good as equal: there rounding decides.
    windows = (row.tokens_BT[None, :128] for row in heldout)
    clear = (w for w in windows if there.router_gap(w)[0] >= parity.ROUTER_TIE)
    tokens_1T = next(clear)
    gap = measure.difference(here.logits(tokens_1T), there.trace(tokens_1T)[0])
    agree = gap.max_rel <= report.LOGITS_TOLERANCE
    words = "agree" if agree else "DO NOT AGREE"
    print(f"\nLogits of {tokens_1T.size} held-out tokens {words}: max rel {gap.max_rel:.1e}.")
    return agree


if __name__ == "__main__":
    # What the first of the training processes compiled, the second finds.
    with tempfile.TemporaryDirectory() as compiled:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
        sys.exit(main())
