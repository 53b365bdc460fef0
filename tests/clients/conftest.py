"""The real server with its demo model, in another interpreter than the clients': theirs has no torch."""

import os
from collections.abc import Iterator

import pytest
from process import Server, serve
from upstreams import Reply, Upstream, upstream


def interpreter(variable: str) -> str:
    """The Python that an environment variable names; without it the tests fail, they are not skipped."""
    path = os.environ.get(variable)
    if not path:
        pytest.fail(f"{variable} is not set; `make test-clients` sets it to a Python of its own.", pytrace=False)
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Started as gemma3-server.md starts it; nothing set but the context."""
    command = [interpreter("SERVER_PYTHON"), "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
    with serve(command, MAX_MODEL_LEN="4096") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="session")
def provider() -> Iterator[Upstream]:
    """A provider's server, whose script each test sets."""
    with upstream(lambda asked: Reply.of({"error": {"message": "there is no script"}}, status=500)) as provider:
        yield provider


@pytest.fixture(scope="session")
def agents_server(provider: Upstream) -> Iterator[Server]:
    """With a context that holds an agent's prompt. The provider speaks chat completions alone, so that what is between
    them and other protocols is this server's own work."""
    settings = {"DEEPSEEK_API_URL": provider.url, "DEEPSEEK_API_KEY": "unused", "MAX_MODEL_LEN": "32768"}
    command = [interpreter("SERVER_PYTHON"), "main.py", "--port", "0"]
    with serve(command, **settings, OMP_NUM_THREADS="2") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def legacy_python() -> str:
    """With the openai SDK and LangChain of 2023."""
    return interpreter("LEGACY_PYTHON")
