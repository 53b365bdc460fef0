"""Coding agents as people start them, without their downloads and telemetry, each with a home of its own."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import interpreter
from documents import blocks
from scripted_model import Call

BINARIES = Path(__file__).parent / "agents" / "node_modules" / ".bin"
ENTRIES = ("PATH", "LANG", "LC_ALL", "TZ")  # what an agent gets of the environment of the tests
WRITTEN = 'print("hello from a file")\n'
SETTINGS = "docs/messages.md"
Object = dict[str, Any]


@dataclass(frozen=True)
class Workplace:
    """A repository with one file, and a home folder beside it."""

    home: Path
    repository: Path

    @classmethod
    def under(cls, folder: Path) -> "Workplace":
        place = cls(folder / "home", folder / "repository")
        (folder / "tmp").mkdir()
        place.home.mkdir()
        place.repository.mkdir()
        (place.repository / "greet.py").write_text("def greet(name):\n    return 'Hello, ' + name\n")
        for command in ("init -q", "add .", "commit -q -m first"):
            place.git(*command.split())
        return place

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-c", "init.defaultBranch=main"]
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=self.repository, check=True, capture_output=True, text=True).stdout


def documented(language: str, url: str, model: str, mark: str = "") -> str:
    """Returns a block of the document, with `mark` in it, for this address and model."""
    (block,) = [block for block in blocks(SETTINGS, language) if mark in block]
    return block.replace("http://127.0.0.1:8000", url).replace("Qwen3-30B-A3B", model)


def exported(block: str) -> dict[str, str]:
    """Returns the variables that a block exports."""
    lines = [line for line in block.splitlines() if line.startswith("export ")]
    return dict(pair.split("=") for line in lines for pair in line.split()[1:])


@dataclass(frozen=True)
class Ended:
    """An agent that has ended: its exit status, which is None if its time was over, and all it said."""

    status: int | None
    output: str
    errors: str

    def events(self) -> list[Object]:
        """What it printed as one JSON object per line."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]


@dataclass(frozen=True)
class Agent:
    """How an agent is started in a workplace, how it writes a file, and how its answers and errors are printed."""

    command: Callable[[str, str, str, Workplace], list[str]]  # of the server's address, the model and the task
    environment: Callable[[str, str, Workplace], dict[str, str]]  # of the server's address and the model
    answers: Callable[[Path], tuple[Call | str, ...]]  # with which a model makes it write a file
    says: Callable[[Ended], str]
    complaints: Callable[[Ended], list[Any]]
    bounds: tuple[tuple[str, str], ...] = ()  # variables that keep a weak model from talking on and on
    limit: str = "no limit was met"  # what is printed where they cut its answers


def run_agent(
    agent: Agent,
    url: str,
    model: str,
    task: str,
    place: Workplace,
    *options: str,
    timeout: float = 120,
    is_bounded: bool = False,
) -> Ended:
    """Runs an agent in its workplace to its end, or until its time is over. options: more of its command line."""
    environment = {name: os.environ[name] for name in ENTRIES if name in os.environ}
    environment |= {"HOME": str(place.home), "TMPDIR": str(place.home.parent / "tmp"), "NO_COLOR": "1"}
    environment |= agent.environment(url, model, place) | (dict(agent.bounds) if is_bounded else {})
    process = subprocess.Popen(
        [*agent.command(url, model, task, place), *options],
        cwd=place.repository,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        output, errors = process.communicate(timeout=timeout)
        return Ended(process.returncode, output, errors)
    os.killpg(process.pid, signal.SIGKILL)  # with what it started
    return Ended(None, *process.communicate())


# --- Claude Code


def _claude_command(url: str, model: str, task: str, place: Workplace) -> list[str]:
    format_ = ["--output-format", "stream-json", "--verbose"]
    return [str(BINARIES / "claude"), "--print", task, "--dangerously-skip-permissions", *format_]


def _claude_environment(url: str, model: str, place: Workplace) -> dict[str, str]:
    off = ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_AUTOUPDATER", "DISABLE_TELEMETRY", "IS_SANDBOX")
    return {**exported(documented("text", url, model, "ANTHROPIC_BASE_URL")), **dict.fromkeys(off, "1")}


def _claude_answers(path: Path) -> tuple[Call | str, ...]:
    write = Call("Write", {"file_path": str(path), "content": WRITTEN})
    run = Call("Bash", {"command": f"python3 {path.name}", "description": "Runs the file"})
    return write, run, "The file is written, and it ran."


def _claude_says(ended: Ended) -> str:
    answers = [event["message"] for event in ended.events() if event["type"] == "assistant"]
    return "".join(block.get("text", "") for answer in answers for block in answer["content"])


def _claude_complaints(ended: Ended) -> list[Any]:
    return [event for event in ended.events() if event.get("is_error") or event.get("subtype") == "api_retry"]


CLAUDE_CODE = Agent(
    _claude_command,
    _claude_environment,
    _claude_answers,
    _claude_says,
    _claude_complaints,
    bounds=(("CLAUDE_CODE_MAX_OUTPUT_TOKENS", "200"),),
    limit="exceeded the 200 output token maximum",
)

# --- Codex


def _codex_command(url: str, model: str, task: str, place: Workplace) -> list[str]:
    start = [str(BINARIES / "codex"), "exec", "--json", "--skip-git-repo-check"]
    return [*start, "--dangerously-bypass-approvals-and-sandbox", task]


def _codex_environment(url: str, model: str, place: Workplace) -> dict[str, str]:
    home = place.home / ".codex"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(documented("toml", url, model))
    return {"CODEX_HOME": str(home)}


def _codex_answers(path: Path) -> tuple[Call | str, ...]:
    write = Call("exec_command", {"cmd": f"printf '%s\\n' '{WRITTEN.strip()}' > {path}"})
    return write, Call("exec_command", {"cmd": f"python3 {path.name}"}), "The file is written, and it ran."


def _codex_says(ended: Ended) -> str:
    items = [event["item"] for event in ended.events() if event["type"] == "item.completed"]
    return "".join(item["text"] for item in items if item["type"] == "agent_message")


def _codex_complaints(ended: Ended) -> list[Any]:
    return [event for event in ended.events() if event["type"] in ("error", "turn.failed")]


CODEX = Agent(_codex_command, _codex_environment, _codex_answers, _codex_says, _codex_complaints)

# --- opencode


def _opencode_command(url: str, model: str, task: str, place: Workplace) -> list[str]:
    return [str(BINARIES / "opencode"), "run", "--format", "json", "--auto", task]


def _opencode_environment(url: str, model: str, place: Workplace) -> dict[str, str]:
    config = place.home / "opencode.json"
    config.write_text(documented("json", url, model, "@ai-sdk"))
    off = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS", "SHARE")
    return {"OPENCODE_CONFIG": str(config), **{f"OPENCODE_DISABLE_{name}": "1" for name in off}}


def _opencode_answers(path: Path) -> tuple[Call | str, ...]:
    write = Call("write", {"filePath": str(path), "content": WRITTEN})
    run = Call("bash", {"command": f"python3 {path.name}", "description": "Runs the file"})
    return write, run, "The file is written, and it ran."


def _opencode_says(ended: Ended) -> str:
    return "".join(event["part"]["text"] for event in ended.events() if event["type"] == "text")


def _opencode_complaints(ended: Ended) -> list[Any]:
    return [event for event in ended.events() if event["type"] == "error"]


OPENCODE = Agent(
    _opencode_command,
    _opencode_environment,
    _opencode_answers,
    _opencode_says,
    _opencode_complaints,
    bounds=(("OPENCODE_EXPERIMENTAL_OUTPUT_TOKEN_MAX", "400"),),
)

# --- aider, which asks for text in a form of its own, and for no calls


def _aider_command(url: str, model: str, task: str, place: Workplace) -> list[str]:
    off = ["--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-show-release-notes"]
    plain = ["--no-pretty", "--no-fancy-input", "--no-gitignore", "--no-detect-urls", "--no-suggest-shell-commands"]
    edit = ["--edit-format", "diff", "--yes-always", "--message", task, "greet.py"]
    return [interpreter("AIDER_PYTHON"), "-m", "aider", "--model", f"openai/{model}", *off, *plain, *edit]


def _aider_environment(url: str, model: str, place: Workplace) -> dict[str, str]:
    """With a list of prices that is new, so that it fetches none."""
    prices = place.home / ".aider" / "caches" / "model_prices_and_context_window.json"
    prices.parent.mkdir(parents=True, exist_ok=True)
    prices.write_text('{"none": {}}')
    settings = exported(documented("text", url, model, "OPENAI_API_BASE"))
    return {**settings, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _aider_answers(path: Path) -> tuple[Call | str, ...]:
    block = f"<<<<<<< SEARCH\n=======\n{WRITTEN}>>>>>>> REPLACE"
    return (f"Here is the file.\n\n{path.name}\n```python\n{block}\n```\n",)


def _aider_complaints(ended: Ended) -> list[Any]:
    marks = ("litellm.", "Error:", "Retrying in", "Traceback")
    return [line for line in (ended.output + ended.errors).splitlines() if any(mark in line for mark in marks)]


AIDER = Agent(_aider_command, _aider_environment, _aider_answers, lambda ended: ended.output, _aider_complaints)

AGENTS = {"claude-code": CLAUDE_CODE, "codex": CODEX, "opencode": OPENCODE, "aider": AIDER}
