"""A record as token ids, with what of it is learned."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hybrid_jax.config.data import Source
from hybrid_jax.data import chat, sources
from hybrid_jax.data.sources import Record, Skipped
from hybrid_jax.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """One document, ready to be stored."""

    name: str
    text: str
    """What duplicates are told by."""
    ids: np.ndarray
    """uint32 [T]"""
    learned: np.ndarray | None
    """bool [T]; None: all."""


def text_of(source: Source, record: Record) -> str | Skipped:
    """The text of a record that is no conversation."""
    text = record.content
    if isinstance(text, dict):
        if source.field not in text:
            return Skipped(
                record.name, f"no field {source.field!r}", f"fields: {', '.join(map(str, text))}"
            )
        text = text[source.field]
    if not isinstance(text, str):
        return Skipped(record.name, "not a text", type(text).__name__)
    if not text:
        return Skipped(record.name, "empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        return Skipped(record.name, "not UTF-8", str(error.reason))
    return text


def texts(source: Source) -> Iterator[str]:
    """Every text at a source; what cannot be used is passed over.

    Raises FileNotFoundError or ValueError if there is no file.
    """
    for unit in sources.units(source):
        for record in sources.read(unit):
            if isinstance(record, Record) and isinstance(text := text_of(source, record), str):
                yield text


def conversation_of(record: Record) -> chat.Conversation | Skipped:
    """The conversation in a record."""
    if not isinstance(record.content, dict):
        return Skipped(record.name, "no conversation", "a text without fields")
    try:
        conversation = chat.parse(record.content)
        repr(conversation).encode("utf-8")
    except (chat.BadConversation, UnicodeEncodeError) as error:
        return Skipped(record.name, "no conversation", str(error))
    return conversation


def encode(source: Source, records: list[Record], tokenizer: Tokenizer) -> list[Encoded | Skipped]:
    """Each record in turn; a text ends with the end-of-document id."""
    if source.template is not None:
        return [_encode_conversation(source.template, record, tokenizer) for record in records]
    texts = [text_of(source, record) for record in records]
    good = [text for text in texts if isinstance(text, str)]
    encoded = iter(tokenizer.encode_batch(good))
    return [
        text
        if isinstance(text, Skipped)
        else Encoded(
            record.name, text, np.array([*next(encoded), tokenizer.end_id], np.uint32), None
        )
        for record, text in zip(records, texts, strict=True)
    ]


def _encode_conversation(template: str, record: Record, tokenizer) -> Encoded | Skipped:
    conversation = conversation_of(record)
    if isinstance(conversation, Skipped):
        return conversation
    ids, learned = chat.encode(template, conversation, tokenizer)
    return Encoded(record.name, repr(conversation), ids, learned)
