"""A rendered conversation as token ids, and which of them are learned."""

import re

import numpy as np

from hybrid_jax.data.chat import render
from hybrid_jax.data.chat.conversation import Conversation
from hybrid_jax.data.tokenizer import Tokenizer


def check_tokenizer(template: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer lacks a control token of `template`."""
    lacking = [
        token for token in render.CONTROL[template] if tokenizer.backend.token_to_id(token) is None
    ]
    if lacking:
        raise ValueError(
            f"The template {template} writes {', '.join(lacking)}, which the tokenizer does not "
            "have. Use the tokenizer the model was released with, or let one be trained on this "
            "source: it then gets them."
        )


def encode(
    template: str, conversation: Conversation, tokenizer: Tokenizer, *, ask: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T] uint32, learned [T] bool): what the assistant says, with the token that ends it.

    Between control tokens the text is encoded as one, whoever wrote which part of it, so the ids
    are those of the whole text; a control token inside a message stays plain text.
    """
    control = re.compile("|".join(map(re.escape, render.CONTROL[template])))
    known = {token: tokenizer.id_of(token) for token in render.CONTROL[template]}
    ids: list[int] = []
    learned: list[bool] = []
    run: list[render.Piece] = []

    def flush() -> None:
        if run:
            new_ids, new_learned = _encode_run(run, tokenizer)
            ids.extend(new_ids)
            learned.extend(new_learned)
            run.clear()

    for piece in render.render(template, conversation, ask=ask):
        if piece.verbatim:
            run.append(piece)
            continue
        place = 0
        for match in control.finditer(piece.text):
            if match.start() > place:
                run.append(piece._replace(text=piece.text[place : match.start()]))
            flush()
            ids.append(known[match.group()])
            learned.append(piece.learned)
            place = match.end()
        if place < len(piece.text):
            run.append(piece._replace(text=piece.text[place:]))
    flush()
    return np.array(ids, np.uint32), np.array(learned, bool)


def _encode_run(run: list[render.Piece], tokenizer: Tokenizer):
    """Ids of the pieces as one text; a token is learned if its first character is."""
    text = "".join(piece.text for piece in run)
    is_learned = np.repeat([piece.learned for piece in run], [len(piece.text) for piece in run])
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    starts = [min(start, len(text) - 1) for start, _ in encoded.offsets]
    return encoded.ids, is_learned[starts].tolist()
