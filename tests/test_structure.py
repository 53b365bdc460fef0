"""What keeps the whole readable: imports point one way, and nothing happens at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from process import ROOT

OURS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED = {  # file or folder -> which of our modules it may import
    "errors.py": set(),
    "config.py": set(),
    "schemas.py": set(),
    "progress.py": set(),
    "metrics.py": set(),
    "record.py": {"metrics"},
    "logs.py": {"record"},
    "tracing.py": set(),
    "observer.py": {"connection", "logs", "metrics", "record", "tracing"},
    "replies.py": {"errors"},
    "deadline.py": {"errors", "record", "replies"},
    "access.py": {"config", "errors", "record", "replies"},
    "protocol.py": {"config", "errors", "transport"},
    "transport.py": set(),
    "memory.py": set(),
    "body_limit.py": {"errors", "memory"},
    "request_id.py": {"errors", "replies"},
    "logprobs.py": {"schemas"},
    "atomic_files.py": {"errors"},
    "gguf_header.py": set(),
    "gguf_metadata.py": {"gguf_header"},
    "gguf_tokenizer.py": {"gguf_header"},
    "gguf_parts.py": {"errors", "gguf_header"},
    "conversion.py": {
        *("errors", "atomic_files", "gguf_header", "gguf_metadata", "gguf_parts", "gguf_tokenizer"),
        "engine",  # in the child alone
    },
    "checkpoint.py": {"errors", "atomic_files", "conversion", "gguf_parts"},
    "streaming.py": {"errors", "record", "schemas"},
    "images.py": {"errors"},
    "tool_formats.py": {"argument_schemas", "json_schemas"},
    "repetition.py": set(),
    "json_schemas.py": set(),
    "tools.py": {"errors", "json_schemas", "messages", "repetition", "schemas"},
    "structure.py": {"errors", "json_schemas", "schemas", "tool_formats", "tools"},
    "lenient_json.py": set(),
    "argument_schemas.py": {"json_schemas"},
    "argument_values.py": {"argument_schemas", "lenient_json"},
    "python_calls.py": {"lenient_json"},
    "answer_text.py": {"lenient_json", "streaming"},
    "answer_parts.py": {"answer_text", "argument_schemas", "argument_values", "lenient_json", "tool_formats"},
    "json_calls.py": {"answer_parts", "answer_text", "lenient_json"},
    "element_calls.py": {
        *("answer_parts", "answer_text", "argument_schemas", "argument_values", "lenient_json", "tool_formats"),
    },
    "answer_parser.py": {
        *("answer_parts", "answer_text", "argument_schemas", "argument_values", "element_calls", "json_calls"),
        *("lenient_json", "python_calls", "schemas", "tool_formats"),
    },
    "messages.py": {"errors", "schemas", "tool_formats"},
    "fetching.py": {"errors", "images"},
    "response_output.py": {"schemas"},
    "responses.py": {"errors", "response_output", "schemas"},
    "prompt_templates.py": {"errors", "messages", "schemas", "streaming", "template_probe", "tool_formats"},
    "template_probe.py": {"messages"},
    "cl100k.py": set(),
    "connection.py": {"errors"},
    "strict_json.py": {"connection", "errors"},
    "gateway.py": {"connection", "errors", "providers", "record", "strict_json"},
    "providers/upstream.py": {"errors", "providers", "record"},
    "providers/openai_compatible.py": {"answer_parser", "errors", "providers"},
    "providers/anthropic.py": {"config", "errors", "providers"},
    "providers/anthropic_format.py": {"errors"},
    "engine": {"errors", "engine", "memory"},
}
FORBIDDEN = {"engine": {"fastapi", "starlette", "pydantic"}, "schemas.py": {"torch"}, "streaming.py": {"torch"}}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_one_way(place: str) -> None:
    files = sorted((ROOT / place).glob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]
    for path in files:
        found = imports(path)
        assert found & (OURS | {"engine", "providers"}) <= ALLOWED[place], path
        assert not found & FORBIDDEN.get(place, set()), path


def test_importing_main_loads_neither_torch_nor_a_model() -> None:
    code = "import main, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, timeout=60).returncode == 0


def left_to_test_all() -> set[tuple[str, str]]:
    """(file, test) of each test of which `make test` does not run every case."""
    return {
        (path.stem, node.name)
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if re.search(r"mark\.(slow|thinned)", decorator) or ("cases(" in decorator and "is_slow=" in path.read_text())
    }


def test_what_make_test_leaves_out_is_listed() -> None:
    listed = re.findall(r"^\| (test_\w+) \| (test_\w+) \|", (ROOT / "tests" / "rows.md").read_text(), re.MULTILINE)
    assert set(listed) == left_to_test_all() and len(listed) == len(set(listed))
