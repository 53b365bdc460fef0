"""docs/ says what the code does: its tables are made from it, and what it names exists."""

import ast
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from documents import DOCUMENTS, READMES, SUBJECTS, anchors, code_spans, generated, prose, rows, text_of
from process import ROOT
from pydantic import AliasChoices

from api.responses.requests import ResponsesRequest
from config import Settings
from schemas import ChatCompletionRequest, CompletionRequest, Support
from scripts import docs

RAY_SERVE = (ROOT / "deploy" / "ray_serve.py").read_text()
OF_OTHERS = {  # variables that other programs read
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED", "RAY_ADDRESS", "RAY_SERVE_SESSION_ID_HEADER_KEY"),
    *("CUDA_VISIBLE_DEVICES", "HF_HOME"),
}
WANTED = docs.wanted()
REPLICAS = {f"REPLICAS_{name.upper()}" for name in re.findall(r"^    (\w+): .* = Field\(", RAY_SERVE, re.MULTILINE)}
NAMES = {field.upper() for field in Settings.model_fields}
ALIASES = {
    str(alias).upper()
    for info in Settings.model_fields.values()
    if isinstance(info.validation_alias, AliasChoices)
    for alias in info.validation_alias.choices
}


# --- what is made from the code


@pytest.mark.parametrize("path", WANTED, ids=lambda path: path.name)
def test_make_docs_would_change_nothing(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == WANTED[path], "run `make docs`"


@pytest.mark.parametrize("name", docs.GENERATED)
def test_each_generated_part_stands_in_one_document(name: str) -> None:
    assert sum(text_of(document).count(f"<!-- generated: {name} -->") for document in DOCUMENTS) == 1


@pytest.mark.parametrize("document", ["docs/settings.md", ".env.example"])
def test_every_setting_is_documented_once_and_nothing_else(document: str) -> None:
    text = text_of(document)
    if document == ".env.example":
        listed = re.findall(r"^#([A-Z_]+)=", text, re.MULTILINE)
    else:
        listed = re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(NAMES)


def test_the_defaults_of_env_example_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(re.sub(r"^#(?=[A-Z_]+=)", "", text_of(".env.example"), flags=re.MULTILINE))
    for name in NAMES | ALIASES:
        monkeypatch.delenv(name, raising=False)
    read = Settings(_env_file=tmp_path / ".env")
    assert read == Settings(_env_file=None)


def test_every_setting_has_a_sentence_and_its_default() -> None:
    tables = [row for row in rows(generated("docs/settings.md", "settings")) if row[0].startswith("`")]
    for name, default, sentence in tables:
        info = Settings.model_fields[name.strip("`").lower()]
        assert re.match(r"[A-Z0-9].*\.$", sentence), name
        assert default.startswith("`") == (info.default not in (None, (), {})), name


def test_the_table_of_fields_is_that_of_the_requests() -> None:
    kinds = dict(zip(get_args(Support), ("yes", "no effect", "ignored", "refused"), strict=True))
    table = [row for row in rows(generated("docs/api.md", "fields")) if row[0].startswith("`")]
    for column, request in enumerate((ChatCompletionRequest, CompletionRequest, ResponsesRequest), start=2):
        listed = {row[0].strip("`"): row[column] for row in table if row[column] != "–"}
        assert listed == {name: kinds[request.support(name)] for name in request.model_fields}


def test_every_demo_model_is_listed_with_its_licence() -> None:
    table = rows(generated("docs/models.md", "demo models"))
    demos = [*docs.defined("DEMO_MODELS"), *docs.defined("EMBEDDING_DEMOS")]
    assert [row[0] for row in table if row[0].startswith("`")] == [f"`{name}`" for name in demos]
    assert all(all(row) for row in table)


def test_every_file_of_the_server_is_listed_with_a_sentence() -> None:
    listed = re.findall(r"^\* `(\w+\.py)`: \S.*", generated("docs/architecture.md", "files"), re.MULTILINE)
    tracked = [*ROOT.glob("*.py")]
    tracked += [path for folder in docs.packages().values() for path in folder.glob("*.py")]
    assert sorted(listed) == sorted(path.name for path in tracked if path.name != "__init__.py")


def test_the_picture_of_imports_is_that_of_the_code() -> None:
    picture = re.sub(r"\n +", " ", generated("docs/architecture.md", "imports").split("```")[1])
    lines = re.findall(r"^(\S+) +-> +(.*)$", picture, re.MULTILINE)
    shown = {name: set(re.findall(r"[\w/.]+", others.replace("(nothing)", ""))) for name, others in lines}
    assert {*shown} >= {"main.py", "config.py", "engine", "providers"}
    assert shown == docs.import_graph()
    assert "config.py" in shown["main.py"] and "config.py" not in shown["engine"]
    names = list(shown)
    for number, name in enumerate(names):
        assert shown[name] <= set(names[number + 1 :]), f"{name} is in a circle of imports"


# --- the READMEs' tables


@pytest.mark.parametrize("readme", READMES)
def test_the_settings_in_the_readmes_exist_with_their_defaults(readme: str) -> None:
    table = [row for row in rows(text_of(readme)) if re.fullmatch(r"`[A-Z_]+`", row[0])]
    assert len(table) == 12
    for name, default, _ in table:
        value = docs.default_of(Settings.model_fields[name.strip("`").lower()])
        assert default == f"`{value}`" if value else not re.fullmatch("`[^`]*`", default), name


def test_the_architectures_of_gguf_files_are_those_that_are_read() -> None:
    from checkpoints.gguf_architectures import ARCHITECTURES

    listed = re.search(r"These architectures are read: ([^.]*)\.", text_of("docs/models.md"))
    assert listed and set(re.split(r",? and |,\s+|\s+and\s+", listed[1])) == ARCHITECTURES.keys()


def test_the_families_are_those_that_are_known() -> None:
    names = {family.name for family in docs.defined("FAMILIES")} - {"ChatML", "generic"}
    table = [row for row in rows(text_of("docs/models.md")) if len(row) == 5]
    listed = {row[0].replace("2, 2.5", "2.5").replace("Llama 3.x", "Llama 3") for row in table[1:-1]}
    assert listed == names


# --- what the documents name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_what_exists(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]*)\)", prose(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_every_document_is_reached_from_the_readme() -> None:
    reached, todo = set[str](), ["README.md"]
    while todo:
        document = todo.pop()
        links = re.findall(r"\]\(([^)#\s]+\.md)", text_of(document))
        found = {str(((ROOT / document).parent / link).resolve().relative_to(ROOT)) for link in links}
        todo += [name for name in found - reached if name in DOCUMENTS]
        reached |= found
    assert set(SUBJECTS) <= reached
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text_of("README.md")))
    assert {Path(document).name for document in SUBJECTS} <= linked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    named = {re.match(r"[A-Z_]*", span)[0] for span in code_spans(document)}
    assert {name for name in named if "_" in name and len(name) > 3} <= NAMES | ALIASES | OF_OTHERS | REPLICAS


@pytest.mark.parametrize("document", [d for d in SUBJECTS if d not in ("docs/reports.md", "docs/tool-calls.md")])
def test_lines_are_short_but_for_tables(document: str) -> None:
    assert all(len(line) <= 160 for line in text_of(document).splitlines() if not line.startswith("|"))


def identifiers() -> set[str]:
    """Each class, function and constant of the server, and `Class.method`."""
    names = set[str]()
    for path in docs.modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                functions = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
                names |= {f"{node.name}.{part.name}" for part in functions}
            if isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(
    ("heading", "num_paths", "num_names"),
    [("A streamed chat in ten hops", 15, 15), ("How a model is loaded", 10, 15), ("Recipes", 15, 5)],
)
def test_the_architecture_names_files_and_names_that_exist(heading: str, num_paths: int, num_names: int) -> None:
    told = text_of("docs/architecture.md").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    paths = set(re.findall(r"`([\w/]+(?:\.py|/))`", told))
    assert len(paths) >= num_paths and all((ROOT / path).exists() for path in paths), paths
    named = set(re.findall(r"`([A-Za-z]\w*(?:\.\w+)?)`", told)) - paths
    assert len(named) >= num_names, named
    assert named <= identifiers() | {name.upper() for name in Settings.model_fields}


def test_the_table_of_replacements_names_what_compares_them() -> None:
    table = [row for row in rows(text_of("docs/architecture.md")) if len(row) == 3 and row[1].startswith("`")]
    assert len(table) >= 5 and {row[1].strip("`") for row in table} <= identifiers()


# --- figures


def test_the_figures_beside_other_servers_are_those_that_were_measured() -> None:
    """Each table follows the link to its results."""
    _, *parts = re.split(r"\(\.\./(bench/results/\S*-peers-\S*\.json)\)", text_of("docs/performance.md"))
    assert len(parts) == 2 * 5
    for path, text in zip(parts[::2], parts[1::2], strict=True):
        measured = json.loads((ROOT / path).read_text())["rows"]
        head, *table = (row for row in rows(text.partition("\n\n")[2].partition("\n\n")[0]))
        assert head[-1] == "times better" and len(table) == len(measured)
        for row, measure in zip(table, measured, strict=True):
            figures = [measure[name] for name in (*head[2:-1], "ratio")]
            for shown, figure in zip(row[2:], figures, strict=True):
                assert number(shown) == pytest.approx(figure, abs=0.5 * 10 ** -len(shown.partition(".")[2])), row


def number(shown: str) -> float:
    return float(shown.replace(",", ""))


@pytest.mark.parametrize("readme", READMES)
def test_the_figures_of_the_readmes_are_those_of_the_document(readme: str) -> None:
    known = {tuple(row[2:5]) for row in rows(text_of("docs/performance.md")) if len(row) == 6}
    table = [tuple(row[1:]) for row in rows(text_of(readme)) if len(row) == 4 and re.fullmatch(r"[\d.,]+", row[1])]
    assert len(table) == 4 and set(table) <= known
