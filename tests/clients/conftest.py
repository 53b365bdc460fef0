"""The real server with its demo model, in another interpreter than the clients': theirs has no torch."""

import os
from collections.abc import Iterator

import pytest
from process import Server, serve


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


@pytest.fixture
def legacy_python() -> str:
    """With the openai SDK and LangChain of 2023."""
    return interpreter("LEGACY_PYTHON")
