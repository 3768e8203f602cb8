"""`hybrid-jax generate`: continue a prompt with a checkpoint or a training run."""

import dataclasses
import json
import pathlib
import sys
import time
import typing

import tyro

from hybrid_jax.cli import json_report, opened


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue a prompt and print it; the prompt comes as text, token ids or standard input."""

    model: typing.Annotated[str, tyro.conf.Positional]
    """Directory of a checkpoint (Hugging Face or Orbax) or of a training run."""
    prompt: str | None = None
    """Text to continue; `-` or nothing reads standard input."""
    token_ids: tuple[int, ...] = ()
    """Token ids to continue instead of text; then no tokenizer is needed."""
    max_new_tokens: int = 128
    """Tokens to make at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p."""
    seed: int = 0
    """Seed of the sampling."""
    eos_id: int | None = None
    """Stop at this token; default: the end-of-document token of the tokenizer, if it has one."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: str | None = None
    """Hold the weights of layers in eight bits: int8 (a scale for each output) or fp8 (blocks of
    128x128; a checkpoint's own are kept)."""
    mesh: str | None = None
    """Split the model over all devices, e.g. 'tensor=8' or 'expert=2,tensor=4'; one axis may be -1.
    Without it one device computes."""
    rules: str = "serve"
    """Which mesh axes split which dims; decoding takes rules that gather no parameters."""
    json: pathlib.Path | None = None
    """Also write prompt, tokens, text and timing to this file."""


def run(args: Args) -> int:
    """Print the prompt and its continuation; exit code 0."""
    import numpy as np

    import hybrid_jax

    json_report.check_writable(args.json)
    directory = opened.directory(args.model)
    tokenizer = None
    ids = list(args.token_ids)
    if not ids:
        tokenizer = opened.tokenizer(directory)
        if tokenizer is None:
            raise ValueError(f"{directory} has no tokenizer.json; give the prompt as --token-ids.")
        ids = tokenizer.encode(_prompt(args)).ids
    if not ids:
        raise ValueError("The prompt is empty: give at least one token.")
    model, placement = opened.model(
        directory, args.dtype, args.mesh, args.rules, quantize=args.quantize
    )
    weights = opened.weights(model)
    started = time.perf_counter()
    new = hybrid_jax.generate(
        model,
        np.asarray([ids]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=opened.end_id(tokenizer) if args.eos_id is None else args.eos_id,
        placement=placement,
    )
    new = np.asarray(new)[0].tolist()
    seconds = time.perf_counter() - started
    text = tokenizer.decode(ids + new) if tokenizer else " ".join(map(str, new))
    print(text)
    print(f"[{len(new)} tokens in {seconds:.1f} s, compiling included]", file=sys.stderr)
    if args.quantize is not None:
        held, whole = (size / 1e9 for size in weights.values())
        print(f"[weights: {held:.3f} GB; {whole:.3f} GB in {args.dtype}]", file=sys.stderr)
    if args.json is not None:
        report = {"prompt": ids, "tokens": new, "text": text, "seconds": round(seconds, 3)}
        report |= weights
        args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


def _prompt(args: Args) -> str:
    if args.prompt is None or args.prompt == "-":
        return sys.stdin.read()
    return args.prompt
