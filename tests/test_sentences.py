"""What a user can read is API: every sentence is listed in sentences.txt, and errors are written as sentences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentences import LIST, files, is_sentence, literals, sentences, text_of

import errors

DIALECT = re.compile(
    r"\b(nobody|somebody|everybody|whoever|perhaps|told of|is being|of its own|says that|is said|not known)\b"
    r"|\b(is|are|has|have) no (number|list|model|text|JSON|call|message|embedding)\b"
    r"|\b(wait|waits) (already|to be)\b|\bon (its|their) way\b"
)
CLASSES = {
    name
    for name, item in vars(errors).items()
    if isinstance(item, type) and issubclass(item, errors.APIError | errors.ModelLoadError)
} | {"_invalid"}  # and what makes them


def test_every_sentence_that_a_user_can_read_is_listed() -> None:
    """After a change that is meant, `python tests/sentences.py` writes the list, and its diff shows what users see."""
    assert sentences() == LIST.read_text().splitlines()


def test_sentences_are_told_from_code() -> None:
    assert is_sentence("The URL did not return an image.") and is_sentence("{param} is not supported.")
    assert not is_sentence("tuple[int, str] | None") and not is_sentence("{% for m in messages %}x y{% endfor %}")


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_messages_are_in_plain_words(path: Path) -> None:
    texts = (text for _, text in literals(ast.parse(path.read_text())) if is_sentence(text))
    assert [text for text in texts if DIALECT.search(text)] == []


def raised(tree: ast.Module) -> Iterator[str]:
    """The messages that errors are made with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in CLASSES and node.args:
            if isinstance(node.args[0], ast.JoinedStr):
                yield text_of(node.args[0])
            elif isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


WHOLE = [path for path in files() if path.name != "conversion.py"]  # what its child says ends a sentence


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_errors_are_whole_sentences(path: Path) -> None:
    """They begin with a capital letter or the name of a thing, and end with a full stop, or what another error says."""
    names = r"(claude|detail|dimensions|input|timeout|suffix)\b|[a-z]+_[a-z_.]+ "
    whole = re.compile(rf"([A-Z{{]|{names}).* .*[.}})]", re.DOTALL)
    assert [text for text in raised(ast.parse(path.read_text())) if not whole.fullmatch(text)] == []
