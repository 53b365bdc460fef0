"""LICENSES.md: what the server installs, and under which licence, as the packages themselves say. `make licenses`."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"colorama": "BSD-3-Clause", "httpx2-jsfetch": "BSD-3-Clause"}  # for other platforms: not installed here
SPDX = {
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
HEAD = """# Licences

What `make setup` installs, made from requirements.lock by `make licenses`. torch's CUDA build also brings
NVIDIA's libraries (`nvidia-*`, `cuda-*`: NVIDIA's own licences) and triton (MIT). Models have licences of their own.

| package | version | licence |
|---|---|---|
"""


def pinned() -> Iterator[tuple[str, str]]:
    """(name, version) of everything in the lock, and torch."""
    for file, pattern in (("requirements.lock", r"^([\w.-]+)==([\w.+]+)"), ("requirements.txt", r"^(torch)==([\w.]+)")):
        yield from re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)


def licence(name: str) -> str:
    try:
        return _licence_in(metadata(name))
    except PackageNotFoundError:
        return ELSEWHERE[name]


def _licence_in(found: PackageMetadata) -> str:
    """Returns the expression of newer packages, else the classifiers, else the first words of the field."""
    if expression := found.get("License-Expression"):
        return str(expression)
    named = [text.rsplit(" :: ")[-1] for text in found.get_all("Classifier", []) if text.startswith("License :: ")]
    named = named or str(found["License"]).strip().splitlines()[:1]
    return ", ".join(SPDX.get(text, text) for text in named)


def main() -> None:
    rows = [f"| {name} | {version} | {licence(name)} |\n" for name, version in sorted(pinned())]
    (ROOT / "LICENSES.md").write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main()
