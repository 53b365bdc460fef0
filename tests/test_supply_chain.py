"""What is installed is what the lock names, byte for byte, and none of it runs before it is asked to."""

import re
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from process import ROOT

REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))
# torch needs setuptools at run time. Its line lets a later `import distutils` find setuptools' copy, and does no more;
# a venv of Python 3.11 begins with the same line, before anything is installed.
SETUPTOOLS = (
    "import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os.environ.get(var, 'local') == 'local'; "
    "enabled and __import__('_distutils_hack').add_shim();"
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> dict[tuple[str, str], str]:
    """(name, version) -> what stands below it. A package may have a version for each Python."""
    parts = re.split(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    return {(normal(parts[i]), parts[i + 1]): parts[i + 2] for i in range(1, len(parts), 3)}


def pinned(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {normal(name): exact for name, exact in found}


def installed() -> dict[str, str]:
    found = {}
    for name, _ in lock():
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # for another platform
            continue
    return found


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    assert len(pinned(path)) == len(lines)


def test_the_lock_has_every_requirement_but_torch() -> None:
    own = pinned(ROOT / "requirements.txt")
    assert set(own.items()) - set(lock()) == {("torch", own["torch"])}


def test_everything_in_the_lock_has_hashes_and_nothing_is_for_cuda_alone() -> None:
    for (name, exact), below in lock().items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", below), (name, exact)
        assert not name.startswith(("torch", "nvidia-", "cuda-", "triton")), name


def test_what_is_installed_is_what_is_locked() -> None:
    found = installed()
    assert len(found) > len(lock()) / 2
    assert set(found.items()) <= set(lock())


def test_no_dependency_runs_code_at_every_start() -> None:
    lines = {}
    for name in [*installed(), "torch"]:
        for file in distribution(name).files or []:
            if file.suffix == ".pth":
                lines[name] = Path(str(file.locate())).read_text().strip()
    assert lines == {"setuptools": SETUPTOOLS}


def test_litellm_is_nowhere() -> None:
    """Its versions of March 2026 stole keys from a .pth file at every start of Python."""
    for path in [*REQUIREMENTS, ROOT / "requirements.lock"]:
        assert "litellm" not in path.read_text().lower()


def test_every_locked_package_has_its_licence_listed() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| (\d\S*) \| (.+) \|$", (ROOT / "LICENSES.md").read_text(), re.MULTILINE)
    torch = pinned(ROOT / "requirements.txt")["torch"]
    assert sorted((normal(name), exact) for name, exact, _ in rows) == sorted([*lock(), ("torch", torch)])
    assert all(licence not in ("UNKNOWN", "None") for _, _, licence in rows)
