"""`hybrid-jax parity`: does a published directory compute the same here as in PyTorch?"""

import dataclasses
import json
import pathlib

import tyro

from hybrid_jax.cli import json_report


@dataclasses.dataclass(frozen=True)
class Args:
    """Load a Hugging Face directory in transformers and here, and compare the two in float32.

    Compared are x after every layer, the logits, the gradient of every weight, and greedy text.
    Where transformers is known to compute something else than the model, the command says so and
    takes the right mathematics as reference. max rel is max|ours - reference| / max|reference|.

    Exit code 0: within tolerance (logits 1e-4, gradients 1e-3, equal text); 1: not; 2: bad input.
    """

    path: tyro.conf.Positional[pathlib.Path]
    """Directory with config.json and safetensors, in any of the three published dialects."""
    json: pathlib.Path | None = None
    """Also write the numbers to this file."""
    tokens: int = 272
    """Random tokens a row, at least 3; the default crosses the 256-token block of lightning."""
    rows: int = 2
    """Rows of random tokens."""
    new_tokens: int = 64
    """Tokens to generate greedily from the first 16 of each row."""
    seed: int = 0
    """Draws the random tokens."""


def run(args: Args) -> int:
    """0 if the two sides agree, 1 if not; raises ValueError or OSError for bad input."""
    from hybrid_jax.parity.run import compare

    json_report.check_writable(args.json)
    report = compare(
        args.path, tokens=args.tokens, rows=args.rows, new_tokens=args.new_tokens, seed=args.seed
    )
    print("\n".join(report.lines()))
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0 if report.passed else 1
