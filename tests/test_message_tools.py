"""Tools that a conversation of the Messages API loads and removes."""

from typing import Any

import pytest
from anthropic_requests import HELLO, MODEL, ask

from api.messages.input import as_chat
from api.messages.schemas import MessagesRequest
from errors import InvalidRequest
from schemas import TranslatedChatRequest
from text.tools import tool_set_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": f"Does {name}.", "input_schema": SCHEMA, **more}


TOOLS = [tool("plain"), tool("found", defer_loading=True), tool("never", defer_loading=True)]
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "plain", "input": {"a": "x"}}]}


def results(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": list(content)}]}


def system(*content: Any) -> dict[str, Any]:
    return {"role": "system", "content": list(content)}


def chat(*messages: dict[str, Any], **more: Any) -> TranslatedChatRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [*HELLO, *messages], "tools": TOOLS, **more}
    made = as_chat(MessagesRequest.model_validate(body))
    assert isinstance(made, TranslatedChatRequest)
    return made


def shown_and_callable(made: TranslatedChatRequest) -> tuple[list[str], list[str]]:
    tools = tool_set_of(made)
    return ([], []) if tools is None else ([t["function"]["name"] for t in tools.shown], sorted(tools.schemas))


REFERENCE = {"type": "tool_reference", "tool_name": "found"}
ADDITION = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "found"}}
DEFINITION = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": tool("new")}}
REMOVAL = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "plain"}}


def test_a_deferred_tool_is_neither_shown_nor_callable() -> None:
    assert shown_and_callable(chat()) == (["plain"], ["plain"])
    assert shown_and_callable(chat(tools=[TOOLS[1]])) == ([], [])


@pytest.mark.parametrize(
    ("messages", "name"),
    [([USE, results(REFERENCE)], "found"), ([system(ADDITION)], "found"), ([system(DEFINITION)], "new")],
)
def test_a_tool_that_is_loaded_is_described_in_its_place_and_callable(messages: Any, name: str) -> None:
    """So the prompt's beginning stays the same."""
    made = chat(*messages)
    assert shown_and_callable(made) == (["plain"], sorted(["plain", name]))
    content = made.messages[-1].content
    said = content if isinstance(content, str) else "".join(part.text or "" for part in content or ())
    assert f"The tool {name} can be called:" in said and f'"description": "Does {name}."' in said
    forced = chat(*messages, tool_choice={"type": "tool", "name": name})
    assert shown_and_callable(forced) == (["plain"], [name])


def test_a_tool_that_is_removed_is_still_shown_and_no_longer_callable() -> None:
    made = chat(system(DEFINITION), system(REMOVAL))
    assert shown_and_callable(made) == (["plain"], ["new"])
    assert made.messages[-1].content == "The tool plain can no longer be called."
    assert shown_and_callable(chat(system(REMOVAL))) == ([], [])
    back = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "plain"}}
    assert shown_and_callable(chat(system(REMOVAL), system(back))) == (["plain"], ["plain"])
    assert shown_and_callable(chat(system(DEFINITION), system(REMOVAL), tool_choice={"type": "any"}))[1] == ["new"]


def test_a_reference_to_a_tool_that_is_there_is_a_word_and_no_description() -> None:
    made = chat(USE, results({"type": "tool_reference", "tool_name": "plain"}))
    assert made.messages[-1].content == "The tool plain can be called."


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_addition"},
        {"type": "tool_addition", "tool": {"type": "mcp_toolset_reference"}},
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"description": "x"}}},
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"name": "b", "type": "bash_2"}}},
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": {"name": "b", "input_schema": 5}}},
        {"type": "image", "source": {"type": "url", "url": "https://x/y"}},
    ],
)
def test_a_change_that_cannot_be_made_is_refused_at_its_place(block: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content\[0\]"):
        chat(system(block))


def test_a_system_message_leaves_the_prompt_when_it_says_so() -> None:
    short = {**system({"type": "text", "text": "Soon over."}), "clear_at": "next_user_message"}
    assert chat(short).messages[-1].content == "Soon over."
    later = chat(short, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"})
    assert "Soon over." not in [message.content for message in later.messages]
    kept = chat({**short, "clear_at": "never"}, {"role": "user", "content": "And?"})
    assert kept.messages[1].content == "Soon over."


def test_the_latest_effort_counts() -> None:
    changed = {"role": "system", "output_config": {"effort": "low"}}
    made = chat(changed, output_config={"effort": "high"}, thinking={"type": "adaptive"})
    assert made.reasoning_effort == "low" and len(made.messages) == 1
    assert chat(output_config={"effort": "high"}).reasoning_effort == "high"


def test_a_loaded_tool_is_in_the_prompt_and_others_are_not(thinking_server: Any) -> None:
    start = {"tools": TOOLS, "thinking": {"type": "disabled"}}
    conversation = [*HELLO, USE, results(REFERENCE)]

    def count(**more: Any) -> int:
        return int(ask(thinking_server, "/count_tokens", **{**start, **more}).json()["input_tokens"])

    assert count() == count(tools=TOOLS[:1]) < count(tools=[tool("plain"), tool("found")])
    assert count(messages=conversation) > count(messages=[*HELLO, USE, results()]) + len(str(SCHEMA))
    forced = {"tool_choice": {"type": "tool", "name": "found"}, "max_tokens": 400, "ignore_eos": False}
    told = ask(thinking_server, messages=conversation, temperature=0, model=MODEL, **start, **forced).json()
    assert told["content"][0]["name"] == "found"
