"""The whole comparison of one directory: layers, logits, gradients, greedy text."""

import pathlib

import numpy as np

from hybrid_jax.checkpoint.formats import orbax, training_run
from hybrid_jax.parity import oracles
from hybrid_jax.parity.measure import difference, gradient_differences, top1
from hybrid_jax.parity.ours import Ours
from hybrid_jax.parity.report import LOGITS_TOLERANCE, Greedy, Report

PROMPT_TOKENS = 16

# Two implementations that differ in the last bits choose different experts where two are as good
# as equal, and from there on everything differs. Such rows say nothing and are drawn again.
ROUTER_TIE = 1e-5
DRAWS = 8


def compare(
    directory: pathlib.Path, *, tokens: int, rows: int, new_tokens: int, seed: int = 0
) -> Report:
    """Load `directory` on both sides and compare them on `rows` x `tokens` random token ids.

    Raises ValueError or OSError if the directory cannot be read, or PyTorch is missing.
    """
    for name, value, least in (
        # With 2, the loss sees the first token alone, which attends to nothing but itself: the
        # gradients of queries and keys are exactly zero, and rounding is compared with rounding.
        ("tokens", tokens, 3),
        ("rows", rows, 1),
        ("new_tokens", new_tokens, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    _check_published(directory)
    oracles.require_torch()
    ours = Ours(directory)
    oracle, notes = oracles.choose(directory)
    tokens_BT, tie_notes = draw_tokens(oracle, ours.vocab_size, rows, tokens, seed)

    our_logits, our_layers = ours.trace(tokens_BT)
    logits, layers = oracle.trace(tokens_BT)
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{oracle.name} computes logits that are not finite from {directory}: "
            "nothing can be compared with them."
        )
    return Report(
        directory=str(directory),
        reference=oracle.name,
        notes=notes + tie_notes,
        shape=(rows, tokens),
        layers=[
            (f"model.layers.{layer}", difference(a, b))
            for layer, (a, b) in enumerate(zip(our_layers, layers, strict=True))
        ],
        logits=difference(our_logits, logits),
        top1=top1(our_logits, logits),
        gradients=gradient_differences(ours.gradients(tokens_BT), oracle.gradients(tokens_BT)),
        greedy=compare_greedy(ours, oracle, tokens_BT[:, :PROMPT_TOKENS], new_tokens),
    )


def _check_published(directory: pathlib.Path) -> None:
    """ValueError with the way out for what only this package can read."""
    if orbax.is_orbax(directory) or training_run.is_training_run(directory):
        raise ValueError(
            f"{directory} must be a Hugging Face directory, for transformers reads no other; "
            f"convert it first: hybrid-jax convert {directory} DST --format hf"
        )


def draw_tokens(
    oracle: oracles.Oracle, vocab_size: int, rows: int, tokens: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Random ids [rows, tokens] without a tie of the oracle's routers, and what was drawn again."""
    draw = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    tied = 0
    for _ in range(DRAWS):
        tokens_BT = draw.integers(0, vocab_size, (rows, tokens), dtype=np.int32)
        clear_B = ~(oracle.router_gap(tokens_BT) < ROUTER_TIE)
        kept += list(tokens_BT[clear_B])
        tied += int((~clear_B).sum())
        if len(kept) >= rows:
            notes = [f"{tied} rows with a tie between experts were drawn again"] if tied else []
            return np.stack(kept[:rows]), notes
    return tokens_BT, [
        f"of {DRAWS * rows} rows drawn {tied} have a tie between experts (closer than "
        f"{ROUTER_TIE:.0e}): a difference below may be such a choice; try fewer --tokens"
    ]


def compare_greedy(
    ours: Ours, oracle: oracles.Oracle, prompt_BT: np.ndarray, new_tokens: int
) -> Greedy:
    """Continue the same prompts on both sides; where they part, ask whether it was a tie."""
    our_text = ours.greedy(prompt_BT, new_tokens)
    text = oracle.greedy(prompt_BT, new_tokens)
    parted_B = [int(np.argmax(row)) for row in our_text != text if row.any()]
    if not parted_B:
        return Greedy(tokens=new_tokens, same_tokens=new_tokens)
    undecided = all(
        _is_tie(oracle, prompt, a, b)
        for prompt, a, b in zip(prompt_BT, our_text, text, strict=True)
        if (a != b).any()
    )
    return Greedy(tokens=new_tokens, same_tokens=min(parted_B), undecided=undecided)


def _is_tie(oracle: oracles.Oracle, prompt_T: np.ndarray, ours_T, reference_T) -> bool:
    """Whether one row parts at two tokens, or after two experts, between which nothing decides."""
    at = int(np.argmax(ours_T != reference_T))
    text_1T = np.concatenate([prompt_T, reference_T[:at]])[None]
    logits_W = oracle.trace(text_1T)[0][0, -1]
    margin = logits_W[reference_T[at]] - logits_W[ours_T[at]]
    is_close = margin <= LOGITS_TOLERANCE * np.abs(logits_W).max()
    return bool(is_close or oracle.router_gap(text_1T)[0] < ROUTER_TIE)
