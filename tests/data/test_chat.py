"""Conversations are rendered as published, only the assistant is learned, and nobody else speaks
in control tokens."""

import json

import hypothesis
import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import strategies as st

from hybrid_jax import data
from hybrid_jax.data import chat

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
CALLED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is 1 + 2?"}]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I add.",
            "tool_calls": [
                {"id": "x", "function": {"name": "add", "arguments": '{"a": 1, "b": "two"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "assistant", "content": "<think>\nDone.\n</think>\n\n3."},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}

M1 = (
    "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe brief."
    "<end_of_sentence>\n<beginning_of_sentence>system tool_setting=tools\n"
    "You are provided with these tools:\n<tools>\n"
    '{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}\n</tools>\n\n'
    "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide"
    " tool-name and json-object of arguments, following the format below:\n<tool_calls>\n"
    '{"name": <tool-name>, "arguments": <args-json-object>}\n...\n</tool_calls><end_of_sentence>\n'
    "<beginning_of_sentence>user name=user\nWhat is 1 + 2?<end_of_sentence>\n"
    "<beginning_of_sentence>ai name=assistant\n"
    "[<think>\nI add.\n</think>\nLet me see.\n<tool_calls>\n"
    '{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_calls><end_of_sentence>]\n'
    "<beginning_of_sentence>tool name=tools\ntool name: add\ntool result: 3\n\n<end_of_sentence>\n"
    "<beginning_of_sentence>ai name=assistant\n[<think>\nDone.\n</think>\n3.<end_of_sentence>]\n"
)
M2 = (
    "]~!b[]~b]system\nBe brief.\n\n# Tools\n"
    "You may call one or more tools to assist with the user query.\n"
    "Here are the tools available in JSONSchema format:\n\n<tools>\n"
    '<tool>{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}</tool>\n'
    "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n\n"
    '<minimax:tool_call>\n<invoke name="tool-name-1">\n'
    '<parameter name="param-key-1">param-value-1</parameter>\n'
    '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
    "</minimax:tool_call>[e~[\n]~b]user\nWhat is 1 + 2?[e~[\n"
    "]~b]ai\n<think>\n[I add.\n</think>\n\nLet me see.\n<minimax:tool_call>\n"
    '<invoke name="add">\n<parameter name="a">1</parameter>\n<parameter name="b">two</parameter>\n'
    "</invoke>\n</minimax:tool_call>[e~[]\n]~b]tool\n<response>3</response>[e~[\n"
    "]~b]ai\n<think>\n[Done.\n</think>\n\n3.[e~[]\n"
)
GOLDEN = {"minimax-m1": M1, "minimax-m2": M2}


@pytest.fixture(scope="module")
def tokenizer():
    control = dict.fromkeys(t for tokens in chat.CONTROL.values() for t in tokens)
    return data.train_tokenizer([M1, M2] * 3, 500, control=tuple(control))


def learned_text(tokenizer, ids, learned):
    """What is learned, with brackets around each stretch."""
    text = ""
    kinds = [False, *learned.tolist(), False]
    for idx, before, is_learned, after in zip(ids, kinds, kinds[1:], kinds[2:]):
        text += "[" * (is_learned and not before)
        text += tokenizer.backend.id_to_token(idx) if idx < 8 else tokenizer.decode([idx])
        text += "]" * (is_learned and not after)
    return text


@pytest.mark.parametrize("template", GOLDEN)
def test_a_conversation_with_tools_is_rendered_as_published(template, tokenizer):
    ids, learned = chat.encode(template, chat.parse(CALLED), tokenizer)
    assert learned_text(tokenizer, ids, learned) == GOLDEN[template]


def test_m2_keeps_reasoning_only_after_the_last_question(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hidden"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "shown"},
    ]
    ids, learned = chat.encode("minimax-m2", chat.parse({"messages": messages}), tokenizer)
    assert learned_text(tokenizer, ids, learned) == (
        "]~!b[]~b]system\nYou are a helpful assistant.[e~[\n]~b]user\na[e~[\n]~b]ai\n[b[e~[]\n"
        "]~b]user\nc[e~[\n]~b]ai\n<think>\n[shown\n</think>\n\nd[e~[]\n"
    )


@pytest.mark.parametrize("template", GOLDEN)
def test_asking_ends_where_the_assistant_begins(template):
    conversation = chat.parse(CALLED)
    asked = "".join(p.text for p in chat.render(template, conversation, ask=True))
    whole = "".join(p.text for p in chat.render(template, conversation))
    more = {"minimax-m1": "<beginning_of_sentence>ai name=assistant\n"}
    assert asked == whole + more.get(template, "]~b]ai\n<think>\n")


def _as_transformers_renders(template: str, ask: bool, **given) -> str:
    """With the environment that transformers 5.23 has for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(chat.published(template))
    return compiled.render(add_generation_prompt=ask, **given)


MORE = (
    CALLED,
    {"messages": [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "ö\n"}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
            {"role": "tool", "name": "f", "content": "1"},
            {"role": "tool", "name": "g", "content": "2"},
            {"role": "assistant", "content": "b", "reasoning": "hidden\n"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "<think>shown</think>\n\nd"},
        ]
    },
)


@pytest.mark.parametrize("template", chat.CONTROL)
def test_others_render_the_exported_template_to_the_same_text(template):
    for record in MORE:
        # Theirs are given objects where records may hold JSON.
        messages = json.loads(json.dumps(record["messages"]))
        for message in messages:
            for call in message.get("tool_calls", ()):
                function = call.get("function", call)
                if isinstance(function["arguments"], str):
                    function["arguments"] = json.loads(function["arguments"])
        given = {"messages": messages, "tools": record.get("tools")}
        for ask in (False, True):
            pieces = chat.render(template, chat.parse(record), ask=ask)
            ours = "".join(piece.text for piece in pieces)
            assert _as_transformers_renders(template, ask, **given) == ours
    with pytest.raises(jinja2.exceptions.TemplateError, match="got judge"):
        _as_transformers_renders(template, False, messages=[{"role": "judge", "content": ""}])


@pytest.mark.parametrize("template", GOLDEN)
def test_transformers_renders_the_exported_template(template):
    library = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = json.loads(json.dumps(CALLED["messages"]))
    messages[2]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": "two"}
    (text,), _ = library.render_jinja_template(
        conversations=[messages],
        tools=CALLED["tools"],
        chat_template=chat.published(template),
        add_generation_prompt=False,
    )
    assert text == "".join(piece.text for piece in chat.render(template, chat.parse(CALLED)))


NASTY = (
    "<end_of_sentence>",
    "[e~[",
    "]~b]",
    "ai name=assistant\n",
    "\x000:/verbatim\x00",
    "{{ 7 }}",
)


@hypothesis.given(words=st.lists(st.sampled_from(NASTY), min_size=1, max_size=4))
@hypothesis.settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("template", GOLDEN)
def test_what_people_write_is_never_control(template, tokenizer, words):
    text = "".join(words)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids, learned = chat.encode(template, chat.parse({"messages": messages}), tokenizer)
    plain = [dict(m, content="x") for m in messages]
    plain_ids, _ = chat.encode(template, chat.parse({"messages": plain}), tokenizer)
    control = {tokenizer.backend.token_to_id(token) for token in chat.CONTROL[template]}
    count = lambda some: sum(int(idx) in control for idx in some)
    assert count(ids) == count(plain_ids)
    # All that the assistant wrote is learned, with the token that ends it.
    assert tokenizer.decode(ids[learned]) == text
    assert int(ids[np.flatnonzero(learned)[-1]]) in control
    assert text in tokenizer.decode(ids[~learned])


def test_records_of_other_shapes_become_conversations():
    conversation = chat.parse({"prompt": "a", "response": "b"})
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
    two = chat.parse(
        {
            "messages": [{"role": "system", "content": s} for s in "ab"]
            + [{"role": "assistant", "content": "c"}]
        }
    )
    assert two.system == "a\nb"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no messages, nor prompt and response"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, "a message is no object"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the assistant says nothing"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "the role 'bot'; known are system"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "message is empty"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "neither a text nor a list"),
        ({"prompt": "a", "response": "b", "tools": "{"}, "tools are broken JSON"),
        ({"prompt": "a", "response": "b", "tools": [1]}, "tools are no list of objects"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
            "a call without a name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments are broken JSON",
        ),
    ],
)
def test_what_is_no_conversation_says_why(fields, message):
    with pytest.raises(chat.BadConversation, match=message):
        chat.parse(fields)
