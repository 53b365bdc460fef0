"""The READMEs tell the truth: their examples run, their tables are complete, and both languages say the same."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from process import ROOT, Server, serve
from sentences import PLACES

from checkpoints.demo_models import DEMO_MODELS, EMBEDDING_DEMOS
from config import Settings
from schemas import ChatCompletionRequest, CompletionRequest, ResponsesRequest, Support

READMES = ["README.md", "readme_zh.md"]


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)


def commands(readme: str) -> list[str]:
    """Each command of the shell examples, without its comment."""
    lines = "".join(blocks(readme, "bash")).replace("\\\n", " ")
    found = re.findall(r"^(?:curl .*?^}'|[^\n]+)$", lines, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", command) for command in found]


def on(server: Server, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("readme", READMES)
def test_python_examples_run(demo_server: Server, readme: str) -> None:
    assert blocks(readme, "python")
    for code in blocks(readme, "python"):
        ended = subprocess.run(
            [sys.executable, "-c", on(demo_server, code)], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0 and ended.stdout, ended.stderr


@pytest.mark.thinned(2)
@pytest.mark.parametrize("readme", READMES)
def test_curl_examples_run(demo_server: Server, readme: str) -> None:
    examples = [command for command in commands(readme) if command.startswith("curl")]
    assert examples
    for command in examples:
        ended = subprocess.run(on(demo_server, command), shell=True, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0 and "data: [DONE]" in ended.stdout, ended.stdout


def test_commands_that_start_the_server_start_it(tiny_checkpoint: Path) -> None:
    starts = [command for command in commands("README.md") if "main.py" in command or "uvicorn" in command]
    assert len(starts) == 2
    for command in starts:
        own = command.replace("/path/to/model", str(tiny_checkpoint)).replace("8000", "0")
        own = own.replace("python main.py", f"exec {sys.executable} main.py")
        own = own.replace(" uvicorn ", f" exec {sys.executable} -m uvicorn ")
        with serve(["bash", "-c", own], OMP_NUM_THREADS="2") as server:  # the check at start compares what they compute
            server.wait_until_healthy()


@pytest.mark.parametrize("readme", READMES)
def test_make_targets_exist(readme: str) -> None:
    targets = set(re.findall(r"make ([\w-]+)", "\n".join(commands(readme)))) | {"setup", "check", "bench"}
    assert {"serve", "test"} <= targets
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", [*READMES, ".env.example"])
def test_every_setting_is_documented_and_nothing_else(document: str) -> None:
    text = (ROOT / document).read_text()
    names = {name.upper() for name in Settings.model_fields}
    if document == ".env.example":
        listed = set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))
    else:
        rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", text, re.MULTILINE)
        listed = set(re.findall(r"`([A-Z_]+)`", "".join(rows)))
    assert listed == names


@pytest.mark.parametrize("readme", READMES)
def test_every_demo_model_and_file_is_listed(readme: str) -> None:
    text = (ROOT / readme).read_text()
    assert all(f"`{name}`" in text for name in [*DEMO_MODELS, *EMBEDDING_DEMOS])
    files = [path for place in PLACES for path in ROOT.glob(place) if path.parent.name != "deploy"]
    assert all(path.name in text for path in files if path.name != "__init__.py")


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_fields_is_that_of_the_requests(readme: str) -> None:
    kinds = get_args(Support)
    rows = re.findall(r"^\|.*`model`.*\n(?:\|.*\n)*", (ROOT / readme).read_text(), re.MULTILINE)[0].splitlines()
    for column, request in enumerate((ChatCompletionRequest, CompletionRequest, ResponsesRequest), start=2):
        listed = {
            name: kind
            for kind, row in zip(kinds, rows, strict=True)
            for name in re.findall(r"`(\w+)`", row.split("|")[column])
        }
        assert listed == {name: request.support(name) for name in request.model_fields}


def test_both_languages_have_the_same_examples_and_tables() -> None:
    english, chinese = ((ROOT / readme).read_text() for readme in READMES)
    for language in ("bash", "python"):
        strip = [re.sub(r"#.*|content\": \"[^\"]*\"", "", block) for block in blocks(READMES[0], language)]
        assert strip == [re.sub(r"#.*|content\": \"[^\"]*\"", "", block) for block in blocks(READMES[1], language)]
    assert len(re.findall(r"^\|", english, re.MULTILINE)) == len(re.findall(r"^\|", chinese, re.MULTILINE))
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE))
