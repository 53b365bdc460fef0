"""Claude Code, Codex, opencode and aider at work in a repository, through a proxy that keeps what they ask and get.

With a model whose answers are written down, all is judged, to the file that is there at the end. With the demo model,
which is too weak for such work, only the wire is judged, and that its answers arrive.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from anthropic.types import MessageTokensCount
from coding_agents import AGENTS, WRITTEN, Agent, Ended, Workplace, run_agent
from process import Server
from recording_proxy import Exchange, Recorder, recording
from scripted_model import Call, ScriptedModel
from upstreams import Upstream
from wire_checks import Answered, checked, events_of

SCRIPTED = "deepseek/model"
DEMO = "qwen2.5-coder-0.5b"
OUTPUT = WRITTEN.split('"')[1]
MINUTES = 60.0
BLOCK = 16  # tokens, of which cached prompts consist


@pytest.fixture
def recorder(agents_server: Server) -> Iterator[Recorder]:
    with recording(agents_server.url) as recorder:
        yield recorder


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace.under(tmp_path)


def assert_no_complaints(agent: Agent, ended: Ended) -> None:
    assert not agent.complaints(ended), ended
    assert ended.status == 0, ended


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_does_its_task_with_a_model_that_can(
    name: str, recorder: Recorder, provider: Upstream, place: Workplace
) -> None:
    """Each call is carried out, its result comes back to the model, and the last answer ends the work."""
    agent, path = AGENTS[name], place.repository / "hello.py"
    answers = agent.answers(path)
    provider.script = ScriptedModel(answers)
    provider.asked.clear()
    ended = run_agent(agent, recorder.url, SCRIPTED, "Create hello.py, which prints a greeting, and run it.", place)
    assert_no_complaints(agent, ended)
    answered = [checked(exchange) for exchange in recorder.exchanges]
    assert path.read_text() == WRITTEN
    assert str(answers[-1]).strip() in agent.says(ended)
    num_calls = sum(isinstance(answer, Call) for answer in answers)
    assert len({name for answer in answered for name in answer.call_ids}) == num_calls
    results = [str(message) for asked in provider.asked for message in asked.body["messages"]]
    assert num_calls == 0 or any("'role': 'tool'" in message and OUTPUT in message for message in results)


def test_codex_finds_a_tool_of_a_namespace(recorder: Recorder, provider: Upstream, place: Workplace) -> None:
    """Models know the tool by one name; the call comes back to Codex with its namespace."""
    provider.script = ScriptedModel((Call("multi_agent_v1__close_agent", {"target": "nobody"}), "Nobody was there."))
    ended = run_agent(AGENTS["codex"], recorder.url, SCRIPTED, "Close the agent nobody.", place)
    assert_no_complaints(AGENTS["codex"], ended)
    _, second = recorder.exchanges
    call, result = [item for item in second.sent["input"] if item["type"].startswith("function_call")]
    assert (call["namespace"], call["name"]) == ("multi_agent_v1", "close_agent")
    assert "invalid agent id" in result["output"], "the tool itself has answered"


@pytest.mark.timeout(20 * MINUTES)
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_meets_no_error_on_its_way_with_the_demo_model(
    name: str, recorder: Recorder, place: Workplace
) -> None:
    """It may end where the model has nothing more to say, or talks on and on: then where its time is over."""
    agent, task = AGENTS[name], "Add a docstring to greet in greet.py."
    ended = run_agent(agent, recorder.url, DEMO, task, place, timeout=9 * MINUTES, is_bounded=True)
    exchanges = recorder.exchanges
    if ended.status is None and not exchanges[-1].is_whole:
        assert len(events_of(exchanges.pop())) > 1, "the model was talking when the time was over"
    elif agent.limit not in ended.output:
        assert_no_complaints(agent, ended)
    answers = [checked(exchange) for exchange in exchanges]
    assert ended.status is None or any(has_arrived(answer, agent.says(ended), exchanges) for answer in answers), ended


@pytest.mark.timeout(20 * MINUTES)
def test_claude_code_finds_all_but_its_new_turn_in_the_cache(recorder: Recorder, place: Workplace) -> None:
    """Its first request is of some 12,000 tokens, and its system prompt begins with a line that may change."""
    agent = AGENTS["claude-code"]
    for task, options in (("Say hello.", []), ("Say it again.", ["--continue"]), ("And again.", ["--continue"])):
        run_agent(agent, recorder.url, DEMO, task, place, *options, timeout=6 * MINUTES, is_bounded=True)
    usages = [events_of(exchange)[-2]["usage"] for exchange in recorder.exchanges]
    prompts = [usage["input_tokens"] + usage["cache_read_input_tokens"] for usage in usages]
    assert len(prompts) >= 3 and prompts[0] > 8000
    for before, usage in zip(prompts, usages[1:], strict=False):
        assert usage["cache_read_input_tokens"] > before - BLOCK, usages


def test_claude_code_counts_what_its_context_holds(recorder: Recorder, place: Workplace) -> None:
    """By a request for each part of its prompt: texts, tools, and all tools together."""
    agent = AGENTS["claude-code"]
    assert_no_complaints(agent, run_agent(agent, recorder.url, DEMO, "/context", place))
    exchanges = recorder.exchanges
    assert {(exchange.route, exchange.status) for exchange in exchanges} == {("/v1/messages/count_tokens", 200)}
    counts = [MessageTokensCount.model_validate_json(exchange.answer, strict=True) for exchange in exchanges]
    assert max(count.input_tokens for count in counts) > 4000


def has_arrived(answer: Answered, said: str, exchanges: list[Exchange]) -> bool:
    """Whether an agent shows an answer, or returns a result of its calls."""
    is_shown = answer.text.strip() != "" and answer.text.strip()[:100] in said
    return is_shown or any(call.encode() in exchange.body for call in answer.call_ids for exchange in exchanges)
