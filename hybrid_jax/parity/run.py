"""The whole comparison of one directory: layers, logits, gradients, greedy text."""

import pathlib

import numpy as np

from hybrid_jax.parity import oracles
from hybrid_jax.parity.measure import difference, gradient_differences, top1
from hybrid_jax.parity.ours import Ours
from hybrid_jax.parity.report import LOGITS_TOLERANCE, Greedy, Report

PROMPT_TOKENS = 16


def compare(
    directory: pathlib.Path, *, tokens: int, rows: int, new_tokens: int, seed: int = 0
) -> Report:
    """Load `directory` on both sides and compare them on `rows` x `tokens` random token ids.

    Raises ValueError or OSError if the directory cannot be read, or PyTorch is missing.
    """
    for name, value, least in (
        ("tokens", tokens, 2),
        ("rows", rows, 1),
        ("new_tokens", new_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    oracles.require_torch()
    ours = Ours(directory)
    oracle, notes = oracles.choose(directory)
    draw = np.random.default_rng(seed)
    tokens_BT = draw.integers(0, ours.vocab_size, (rows, tokens), dtype=np.int32)

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
        notes=notes,
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
    """Whether the logits of the two tokens at which one row parts lie within the tolerance."""
    at = int(np.argmax(ours_T != reference_T))
    logits_W = oracle.last_logits(np.concatenate([prompt_T, reference_T[:at]])[None])[0]
    margin = logits_W[reference_T[at]] - logits_W[ours_T[at]]
    return bool(margin <= LOGITS_TOLERANCE * np.abs(logits_W).max())
