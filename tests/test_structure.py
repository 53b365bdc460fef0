"""What keeps the whole readable: imports point one way, and nothing happens at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from process import PACKAGES, ROOT

TOP = ("main", "config", "setting_values", "provider_table", "schemas", "prompt_templates", "errors")
ALLOWED = {  # package or file at the top -> which of the others it may import; those further up are not among them
    "errors": set(),
    "provider_table": set(),
    "schemas": set(),
    "telemetry": set(),
    "vision": {"errors"},
    "engine": {"errors", "vision"},
    "setting_values": {"provider_table"},
    "config": {"engine", "provider_table", "setting_values"},
    "checkpoints": {"engine", "errors"},
    "text": {"errors", "schemas"},
    "prompt_templates": {"errors", "schemas", "text", "vision"},
    "server": {"config", "errors", "setting_values", "telemetry"},
    "providers": {"config", "errors", "provider_table", "schemas", "server", "telemetry", "text"},
    "serving": {
        "checkpoints",
        "config",
        "engine",
        "errors",
        "prompt_templates",
        "schemas",
        "telemetry",
        "text",
        "vision",
    },
    "api": {"config", "errors", "providers", "schemas", "server", "serving", "setting_values", "telemetry", "text"},
    "main": {"api", "config", "engine", "server", "serving", "telemetry"},
}
FORBIDDEN = {  # package -> libraries that are none of its business
    "engine": {"fastapi", "starlette", "pydantic", "tokenizers"},
    "text": {"fastapi", "starlette", "torch"},
    "checkpoints": {"fastapi", "starlette", "pydantic"},
    "schemas": {"torch"},
    "api": {"torch"},
}


def files_of(place: str) -> list[Path]:
    return sorted((ROOT / place).rglob("*.py")) or [ROOT / f"{place}.py"]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, with their packages, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_package_has_a_rule_and_a_sentence() -> None:
    assert set(ALLOWED) == {*TOP, *PACKAGES}
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP), "the top level stays flat and small"
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
        assert len(ast.parse((folder / "__init__.py").read_text()).body) == 1, "a package has no code of its own"


def test_the_rules_have_no_circle() -> None:
    """Each may import only what is above it in the table, so none points up."""
    order = list(ALLOWED)
    for place, allowed in ALLOWED.items():
        assert allowed <= set(order[: order.index(place)]), place


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_one_way(place: str) -> None:
    ours = set(ALLOWED) - {place}
    for path in files_of(place):
        found = {name.split(".")[0] for name in imports(path)}
        assert found & ours <= ALLOWED[place], path
        assert not found & FORBIDDEN.get(place, set()), path


def test_no_files_import_each_other() -> None:
    """No circle, however long, in the order in which files are imported."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for place in ALLOWED for path in files_of(place)
    }
    left = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_every_package_is_type_checked_and_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'"([\w.]+)"', re.search(r"^files = (.*)$", text, re.MULTILINE)[1])
    assert {"main.py", *PACKAGES} <= set(listed)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench"} == set(PACKAGES)


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


ALLOCATING = {"torch.empty", "torch.zeros", "torch.ones", "torch.full", "torch.linspace", "torch.rand", "torch.randn"}


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda path: path.name)
def test_the_engine_names_the_type_of_each_tensor_it_makes(path: Path) -> None:
    """transformers changes torch's default type while it loads a model, in all threads: another model's kernels would
    then get memory of half the size that they write."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in ALLOCATING]
    assert [call.lineno for call in made if not any(part.arg == "dtype" for part in call.keywords)] == []
