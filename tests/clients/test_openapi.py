"""schemathesis sends what /openapi.json allows, and what it does not: nothing may break the server or the document."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import interpreter
from process import ROOT, Server, serve

SAVE = "import sys, pathlib; from models import save_tiny_checkpoint; save_tiny_checkpoint(pathlib.Path(sys.argv[1]))"
RUN = [sys.executable, "-m", "schemathesis.cli", "run", "--no-color", "--max-examples", "150", "--seed", "1"]
# a document cannot say all that is checked: which fields go together, which tokens the model has ...
RUN += ["--exclude-checks", "positive_data_acceptance"]


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("models") / "Tiny"
    python = interpreter("SERVER_PYTHON")
    subprocess.run([python, "-c", SAVE, directory], cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}, check=True)
    with serve([python, "main.py", "--port", "0"], MODEL_PATH=str(directory), MAX_MODEL_LEN="120") as server:
        server.wait_until_healthy()
        yield server


def test_no_request_breaks_the_server_or_its_document(tiny_server: Server, tmp_path: Path) -> None:
    hooks = {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(Path(__file__).parent)}
    command = [*RUN, tiny_server.url + "/openapi.json"]
    ended = subprocess.run(command, cwd=tmp_path, env={**os.environ, **hooks}, capture_output=True, text=True)
    shown = "\n".join(line[:500] for line in ended.stdout.splitlines())  # a request may take thousands
    assert ended.returncode == 0, shown[-9000:] + ended.stderr[-2000:]
    assert "Traceback" not in "".join(tiny_server.lines)
    tiny_server.post("/v1/models/load", model="Tiny")  # a request may have unloaded it
    tiny_server.wait_until_idle()
