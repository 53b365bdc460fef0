"""The documents, and what stands in them."""

import re

from process import ROOT

READMES = ["README.md", "readme_zh.md"]
SUBJECTS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = [*READMES, *SUBJECTS]


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def commands(document: str, *languages: str) -> list[str]:
    """Each command of the shell examples, without its comment."""
    lines = "".join(blocks(document, *languages)).replace("\\\n", " ")
    found = re.findall(r"^(?:curl .*?^}'|[^\n]+)$", lines, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", command) for command in found]


def prose(document: str) -> str:
    """The text without its blocks."""
    return re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def code_spans(document: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(document))


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def generated(document: str, name: str) -> str:
    """The part that `make docs` writes under this name."""
    found = re.search(rf"<!-- generated: {name} -->\n(.*?)<!-- end -->", text_of(document), re.DOTALL)
    assert found
    return found[1]


def anchors(document: str) -> set[str]:
    """What a link can name behind `#`: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
