"""A conversation as text, with what in it is control, what is said, and what is to be learned.

What people write into a message can never become a control token: templates mark whatever comes
from the record (`verbatim`), and only what the template itself writes may be one.
"""

import functools
import json
import pathlib
import secrets
from typing import NamedTuple

import jinja2
import jinja2.sandbox

from hybrid_jax.data.chat.conversation import Conversation

_MARKS = ("verbatim", "/verbatim", "learned", "/learned")
TEMPLATES = pathlib.Path(__file__).with_name("templates")

# Control tokens of each template, as the released tokenizers spell them.
_M1_TOKENS = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
_M2_TOKENS = ("]~!b[", "]~b]", "[e~[")

CONTROL = {
    "minimax-text-01": _M1_TOKENS,
    "minimax-m1": _M1_TOKENS,
    "minimax-m2": _M2_TOKENS,
}
"""Template -> tokens that it writes and a tokenizer must have."""
FILES = {
    # The same frame; Text-01 came without tools.
    "minimax-text-01": "minimax-m1.jinja",
    "minimax-m1": "minimax-m1.jinja",
    "minimax-m2": "minimax-m2.jinja",
}


class Piece(NamedTuple):
    """A stretch of the rendered text, all of one kind."""

    text: str
    verbatim: bool
    """Comes from the record, so it holds no control token."""
    learned: bool
    """The assistant says it."""


def render(template: str, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
    """The pieces of a conversation in order; with `ask` the assistant is to speak next.

    `template` is one of `CONTROL`.
    """
    turns = conversation.turns
    # Nobody can have written these marks into a message.
    salt = secrets.token_hex(16)
    marks = {what: f"\x00{salt}:{what}\x00" for what in _MARKS}
    users = [idx for idx, turn in enumerate(turns) if turn.role == "user"]
    text = _template(template).render(
        system=conversation.system,
        tools=conversation.tools,
        turns=turns,
        ask=ask,
        last_user=users[-1] if users else -1,
        marks=marks,
    )
    return list(_pieces(text, marks))


def _pieces(text: str, marks: dict[str, str]):
    what = {mark: name for name, mark in marks.items()}
    state = {"verbatim": False, "learned": False}
    opening = next(iter(what))[: next(iter(what)).index(":") + 1]
    while text:
        before, found, rest = text.partition(opening)
        if before:
            yield Piece(before, **state)
        if not found:
            return
        name, _, text = rest.partition("\x00")
        state[name.removeprefix("/")] = not name.startswith("/")


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=False,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["verbatim"] = _marked("verbatim")
    environment.filters["learned"] = _marked("learned")
    return environment.get_template(FILES[name])


def _marked(what: str):
    @jinja2.pass_context
    def mark(context, text) -> str:
        marks = context["marks"]
        return f"{marks[what]}{text}{marks['/' + what]}" if text else ""

    return mark
