"""The examples in the READMEs and in docs/ run, and both READMEs say the same."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from documents import DOCUMENTS, READMES, blocks, code_spans, commands, prose, rows, text_of
from process import ROOT, Server, serve

from config import Settings

WITH_PYTHON = [document for document in DOCUMENTS if blocks(document, "python")]
WITH_CURL = [document for document in DOCUMENTS if any(c.startswith("curl") for c in commands(document, "bash"))]
START = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python main\.py|uvicorn main:app)\b")
MAKE = re.compile(r"((?:[A-Z_]+=(?:'[^']*'|\S+) )*)make ([\w-]+)$")


def on(server: Server, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url)


def server_for(document: str, request: pytest.FixtureRequest) -> Server:
    """The demo model, or one that sees."""
    server: Server = request.getfixturevalue("seeing_server" if document == "docs/images.md" else "demo_server")
    return server


@pytest.mark.thinned(2)
@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_examples_run(request: pytest.FixtureRequest, document: str) -> None:
    server = server_for(document, request)
    for code in blocks(document, "python"):
        ended = subprocess.run([sys.executable, "-c", on(server, code)], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0 and ended.stdout, ended.stderr


@pytest.mark.thinned(2)
@pytest.mark.parametrize("document", WITH_CURL)
def test_curl_examples_run(demo_server: Server, document: str) -> None:
    for command in [command for command in commands(document, "bash") if command.startswith("curl")]:
        ended = subprocess.run(on(demo_server, command), shell=True, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        if re.search(r'"stream": true', command):
            assert "data: [DONE]" in ended.stdout, ended.stdout
        else:
            assert "error" not in json.loads(ended.stdout), ended.stdout


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_show_curl_and_python_and_stream(readme: str) -> None:
    assert readme in WITH_PYTHON and readme in WITH_CURL
    assert any('"stream": true' in command for command in commands(readme, "bash"))


def starts() -> list[str]:
    """The commands that start the server, each once."""
    return sorted({command for d in DOCUMENTS for command in commands(d, "bash") if START.match(command)})


def test_commands_that_start_the_server_start_it(tiny_checkpoint: Path) -> None:
    assert sum(command in starts() for command in commands("README.md", "bash")) == 2
    for command in starts():
        own = re.sub(r"\b80\d\d\b", "0", command.replace("/path/to/model", str(tiny_checkpoint)))
        own = own.replace("python main.py", f"exec {sys.executable} main.py")
        own = own.replace(" uvicorn ", f" exec {sys.executable} -m uvicorn ")
        with serve(["bash", "-c", own], OMP_NUM_THREADS="2") as server:  # the check at start compares what they compute
            server.wait_until_healthy()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_bash_block_is_one_that_is_tested(document: str) -> None:
    """What cannot run in a test stands in a block of `console` or `text`."""
    for command in commands(document, "bash"):
        assert command.startswith("curl -s http://127.0.0.1:8000/") or START.match(command) or MAKE.match(command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_commands_have_targets_and_valid_settings(document: str) -> None:
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join([*commands(document, "bash"), *code_spans(document)])))
    if targets:
        subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
    for command in commands(document, "bash"):
        if made := MAKE.match(command):
            given = dict(re.findall(r"([A-Z_]+)='?([^' ]*)'?", made[1]))
            Settings.model_validate({name.lower(): value for name, value in given.items()})
            assert {name.lower() for name in given} <= Settings.model_fields.keys()


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_name_the_commands_that_everybody_needs(readme: str) -> None:
    assert {"serve", "test"} <= set(re.findall(r"make ([\w-]+)", "\n".join(commands(readme, "bash"))))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_the_examples_and_texts_name_exists(document: str) -> None:
    """Files of this repository, and programs that are run with `python -m`."""
    text = "\n".join([*commands(document, "console", "text"), *code_spans(document)])
    for path in re.findall(r"(?<![\w/.-])((?:deploy|scripts|tests|bench)/[\w./-]*|requirements[\w.-]*\.\w+)", text):
        assert (ROOT / path).exists() or path == "deploy/.env", path
    for module in re.findall(r"python -m ((?:bench|deploy)[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_both_languages_have_the_same_examples_tables_and_names() -> None:
    english, chinese = READMES
    for language in ("bash", "python", "console", "text"):
        examples = [
            [re.sub(r"#.*|content\": \"[^\"]*\"", "", block) for block in blocks(readme, language)]
            for readme in READMES
        ]
        assert examples[0] == examples[1]
    for pattern in (r"^\|", r"^#+ ", r"^\* ", r"^!\["):
        found = [len(re.findall(pattern, prose(readme), re.MULTILINE)) for readme in READMES]
        assert found[0] == found[1], pattern
    assert Counter(code_spans(english)) == Counter(code_spans(chinese))
    links = [Counter(re.findall(r"\]\(([^)]*)\)", text_of(readme))) for readme in READMES]
    assert links[0] - links[1] == Counter({"readme_zh.md": 1}) and links[1] - links[0] == Counter({"README.md": 1})


def test_both_languages_have_the_same_figures() -> None:
    english, chinese = (
        [[cell for cell in row if re.fullmatch(r"[\d.,]+", cell)] for row in rows(text_of(readme))]
        for readme in READMES
    )
    assert english == chinese and any(english)


@pytest.mark.parametrize("readme", READMES)
def test_a_newcomer_can_read_it_in_five_minutes(readme: str) -> None:
    lines = text_of(readme).splitlines()
    assert len(lines) <= 130
    assert len(text_of(readme).split()) <= 1600
    assert all(len(line) <= 160 for line in lines if not line.startswith("|"))
