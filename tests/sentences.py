"""The sentences in the code that a user can read, found by parsing it; `python tests/sentences.py` lists them anew.

A sentence is a text of three words or more that is neither a docstring, nor code of another language.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from process import PACKAGES, ROOT

LIST = ROOT / "tests" / "sentences.txt"
PLACES = ("*.py", "deploy/*.py", *(f"{package}/**/*.py" for package in PACKAGES))
CODE = re.compile(
    r"\{%|\n.*[{:<]|\\[dpsw]|[\w\]] ?\||\| ?$|[({]\||blanks|%json"
    r"|^((start|call|bare|head)[_:]|text/|%\(|arena|model mess)"
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def files() -> list[Path]:
    return sorted(path for place in PLACES for path in ROOT.glob(place))


def literals(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Texts that are no docstrings, in the order of the file; what an f-string puts in is written as in the code."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node, text_of(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node, node.value


def text_of(node: ast.JoinedStr) -> str:
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else ast.unparse(ast.JoinedStr([part]))[2:-1]
        for part in node.values
    )


def is_sentence(text: str) -> bool:
    words = re.sub(r"\{[^}]*\}", "X", text).split()
    return (len(words) >= 3 or len(words) == 2 and text.endswith(".")) and not CODE.search(text)


def sentences() -> list[str]:
    """A line each, as `file: text`, sorted within each file."""
    found = []
    for path in files():
        texts = {text for _, text in literals(ast.parse(path.read_text())) if is_sentence(text)}
        found += [f"{path.relative_to(ROOT)}: {text}".replace("\n", "\\n") for text in sorted(texts)]
    return found


if __name__ == "__main__":
    LIST.write_text("\n".join(sentences()) + "\n")
