"""Conversations: parsed, rendered by a published template, encoded with a loss mask."""

from hybrid_jax.data.chat.conversation import BadConversation, Call, Conversation, Turn, parse
from hybrid_jax.data.chat.encode import check_tokenizer, encode
from hybrid_jax.data.chat.published import published
from hybrid_jax.data.chat.render import CONTROL, render

__all__ = [
    "CONTROL",
    "BadConversation",
    "Call",
    "Conversation",
    "Turn",
    "check_tokenizer",
    "encode",
    "parse",
    "published",
    "render",
]
