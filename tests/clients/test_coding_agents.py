"""Claude Code, Codex, opencode and aider at work in a repository, through a proxy that keeps what they ask and get.

With a model whose answers are written down, all is judged, to the file that is there at the end. With the demo model,
which is too weak for such work, only the wire is judged, and that its answers arrive.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from coding_agents import AGENTS, WRITTEN, Agent, Ended, Workplace, run_agent
from process import Server
from recording_proxy import Exchange, Recorder, recording
from scripted_model import Call, ScriptedModel
from upstreams import Upstream
from wire_checks import Answered, checked

SCRIPTED = "deepseek/model"
DEMO = "qwen2.5-coder-0.5b"
OUTPUT = WRITTEN.split('"')[1]
MINUTES = 60.0


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


@pytest.mark.timeout(20 * MINUTES)
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_meets_no_error_on_its_way_with_the_demo_model(
    name: str, recorder: Recorder, place: Workplace
) -> None:
    """It may end when the model has nothing more to say, or when its time is over, in the middle of an answer."""
    agent = AGENTS[name]
    ended = run_agent(agent, recorder.url, DEMO, "Add a docstring to greet in greet.py.", place, timeout=9 * MINUTES)
    *others, last = recorder.exchanges
    answered = [checked(exchange) for exchange in others]
    if ended.status is None and not last.is_whole:
        assert last.status in (0, 200)
    else:
        assert_no_complaints(agent, ended)
        answered.append(checked(last))
    assert any(has_arrived(answer, agent.says(ended), recorder.exchanges) for answer in answered), ended


def has_arrived(answer: Answered, said: str, exchanges: list[Exchange]) -> bool:
    """Whether an agent shows an answer, or returns a result of its calls."""
    is_shown = answer.text.strip() != "" and answer.text.strip()[:100] in said
    return is_shown or any(call.encode() in exchange.body for call in answer.call_ids for exchange in exchanges)
