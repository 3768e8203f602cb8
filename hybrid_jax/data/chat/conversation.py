"""Conversations as records hold them, in one checked form."""

import dataclasses
import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class BadConversation(ValueError):
    """A record that is no conversation; says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a tool by the assistant."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says at a time."""

    role: str
    """user, assistant or tool."""
    text: str
    reasoning: str = ""
    """The assistant's thoughts before the text."""
    calls: tuple[Call, ...] = ()
    """Tools that the assistant calls after the text."""
    name: str = ""
    """The tool that answers."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in order, with what stands before them."""

    turns: tuple[Turn, ...]
    system: str = ""
    """All system messages, one after the other."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of functions (name, description, parameters), without OpenAI's wrapping."""


def parse(fields: dict[str, Any]) -> Conversation:
    """A record's `messages` (and `tools`), or its `prompt` and `response`.

    Messages are OpenAI's: role, content (a text, or parts with a text), reasoning_content and
    tool_calls of the assistant, name of a tool. `<think>...</think>` at the beginning of an
    assistant's text is its reasoning too. Raises BadConversation.
    """
    messages = fields.get("messages")
    if messages is None and isinstance(fields.get("prompt"), str):
        answer = fields.get("response", fields.get("completion"))
        messages = [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": answer},
        ]
    if not isinstance(messages, list) or not messages:
        raise BadConversation("no messages, nor prompt and response")
    if not all(isinstance(message, dict) for message in messages):
        raise BadConversation("a message is no object")
    system = [_text(message) for message in messages if message.get("role") == "system"]
    names = _names_of_calls(messages)
    turns = tuple(_turn(message, names) for message in messages if message.get("role") != "system")
    if not any(turn.role == "assistant" for turn in turns):
        raise BadConversation("the assistant says nothing")
    return Conversation(turns, "\n".join(filter(None, system)), _tools(fields.get("tools")))


def _turn(message: dict, names: dict[str, str]) -> Turn:
    role = message.get("role")
    if role not in ROLES:
        raise BadConversation(f"the role {role!r}; known are {', '.join(ROLES)}")
    text = _text(message)
    if role == "tool":
        name = message.get("name") or names.get(message.get("tool_call_id", ""), "")
        return Turn(role, text, name=str(name))
    if role == "user":
        return Turn(role, text)
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(reasoning, str):
        raise BadConversation("reasoning_content is no text")
    if not reasoning and text.startswith("<think>") and "</think>" in text:
        reasoning, text = text.removeprefix("<think>").split("</think>", 1)
    calls = tuple(map(_call, message.get("tool_calls") or ()))
    if not (text or reasoning or calls):
        raise BadConversation("an assistant's message is empty")
    return Turn(role, text.lstrip("\n") if reasoning else text, reasoning.strip("\n"), calls)


def _text(message: dict) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise BadConversation("content is neither a text nor a list of texts")


def _call(call: Any) -> Call:
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadConversation("a call's arguments are broken JSON") from None
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise BadConversation("a call without a name or with arguments that are no object")
    return Call(function["name"], arguments)


def _names_of_calls(messages: list[dict]) -> dict[str, str]:
    """Which function each call id means."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return {
        call["id"]: str(call.get("function", call).get("name", ""))
        for call in calls
        if isinstance(call, dict) and isinstance(call.get("id"), str)
    }


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadConversation("tools are broken JSON") from None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadConversation("tools are no list of objects")
    return tuple(tool.get("function", tool) for tool in tools)
