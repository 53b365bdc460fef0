"""The parts of the documents that are made from the code: settings, fields, demo models, files, imports. `make docs`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; `.env.example` is made as a whole.
"""

import ast
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NOT_THE_SERVER = {"tests", "bench", "deploy", "scripts"}  # folders whose files are described elsewhere
WIDTH = 120  # characters of a line
MOST_NAMES = 5  # that a table shows of a field
MARKED = re.compile(r"(<!-- generated: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DEFAULT = re.compile(r"; default: (.*)$")
SUPPORT = {"honoured": "yes", "no meaning here": "no effect", "ignored": "ignored", "refused": "refused"}
SECTIONS = {  # the first setting of each section of docs/settings.md and .env.example
    "model_path": "Model, address and log",
    "api_keys": "Keys and limits of requests",
    "hf_token": "Hub models on demand",
    "openai_api_key": "Other providers",
    "dtype": "Engine",
    "embedding_model_path": "Embeddings",
}


class Demo(NamedTuple):
    """What the code does not know of a demo model."""

    title: str
    licence: str
    download: str | None = None  # its size, where the code's number is not that


DEMOS = {
    "demo:qwen2.5-coder-0.5b": Demo("Qwen2.5-Coder-0.5B-Instruct, Q4_K_M", "Apache 2.0"),
    "demo:gemma-3-270m": Demo(
        "Gemma 3 270M (base), Q4_K_M",
        "[Gemma Terms of Use](https://ai.google.dev/gemma/terms): you accept them by using it",
    ),
    "demo:smollm2-135m": Demo("SmolLM2-135M-Instruct, Q4_1", "Apache 2.0"),
    "demo:all-minilm-l6-v2": Demo("all-MiniLM-L6-v2, for embeddings only", "Apache 2.0", "84 MB"),
}


# --- the code


@cache
def packages() -> dict[str, Path]:
    """Each package's dotted name and folder, at any depth."""
    found = (path.parent for path in sorted(ROOT.glob("[a-z]*/**/__init__.py")))
    folders = [folder for folder in found if folder.relative_to(ROOT).parts[0] not in NOT_THE_SERVER]
    return {".".join(folder.relative_to(ROOT).parts): folder for folder in folders}


@cache
def modules() -> dict[str, Path]:
    """Each module's dotted name and file; a package's own name is that of its `__init__.py`."""
    found = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
    for package, folder in packages().items():
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(name: str) -> Any:
    """Returns the object that one of the modules defines under this name, wherever that module is."""
    for module, path in modules().items():
        for node in tree_of(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            if any(name in (getattr(target, "id", None), getattr(target, "name", None)) for target in targets):
                return getattr(importlib.import_module(module), name)
    raise LookupError(f"No module defines {name}.")


def summary(path: Path) -> str:
    """Returns the first sentence of a file's docstring."""
    paragraph = " ".join((ast.get_docstring(tree_of(path)) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


# --- settings


def name_of(field: str) -> str:
    return field.upper()


def default_of(info: FieldInfo) -> str:
    """Returns the default as it is written in .env; empty where the description has it in words, or none is."""
    value = info.default
    if value is None or value in ((), {}):
        return ""
    if any(getattr(part, "func", None) is defined("parse_bytes") for part in info.metadata):
        return in_bytes(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_bytes(value: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


def sentence_of(info: FieldInfo) -> tuple[str, str]:
    """Returns what a setting is, as a sentence, and its default in words."""
    description = info.description or ""
    words = DEFAULT.search(description)
    text = DEFAULT.sub("", description)
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    aliases = info.validation_alias.choices[1:] if isinstance(info.validation_alias, AliasChoices) else []
    one_of = f" One of {listed(choices)}." if choices else ""
    also = f" Other names: {listed(str(alias).upper() for alias in aliases)}." if aliases else ""
    return f"{text[0].upper()}{text[1:]}.{one_of}{also}", words[1] if words else ""


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Yields the settings in their order, by section."""
    title, fields = "", dict[str, FieldInfo]()
    for field, info in defined("Settings").model_fields.items():
        if field in SECTIONS:
            if fields:
                yield title, fields
            title, fields = SECTIONS[field], {}
        fields[field] = info
    yield title, fields


def settings() -> str:
    """Returns the tables of docs/settings.md."""
    parts = []
    for title, fields in sections():
        rows = ["| setting | default | meaning |", "|---|---|---|"]
        for field, info in fields.items():
            sentence, words = sentence_of(info)
            value = default_of(info)
            rows.append(f"| `{name_of(field)}` | {f'`{value}`' if value else words or 'none'} | {escaped(sentence)} |")
        parts.append("\n".join([f"## {title}", "", *rows]))
    return "\n\n".join(parts)


ENV_HEAD = """\
# Copy this file to .env, remove the # before a setting, and change its value. An empty value leaves the default.
# Each setting is also an environment variable and a flag: PORT=8001 or --port 8001. A flag wins over the environment,
# and the environment wins over this file. docs/settings.md says more. `make docs` writes this list from config.py.
"""


def env_example() -> str:
    lines = [ENV_HEAD]
    for title, fields in sections():
        lines += [f"# --- {title}", ""]
        for field, info in fields.items():
            sentence, words = sentence_of(info)
            text = sentence.replace("`", "") + (f" Default: {words}." if words else "")
            lines += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
            lines += [f"#{name_of(field)}={default_of(info)}"]
        lines.append("")
    return "\n".join(lines)


# --- fields of requests


def field_table(*requests: str) -> Callable[[], str]:
    """Returns a table with a row per field and a column per request: what becomes of it."""

    def table() -> str:
        classes = [defined(name) for name in requests]
        schemas = [cls.model_json_schema() for cls in classes]
        heads = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.removesuffix("Request")).lower() for name in requests]
        rows = [f"| field | value | {' | '.join(heads)} | note |", "|---" * (len(heads) + 3) + "|"]
        for field in sorted({field for cls in classes for field in cls.model_fields}):
            has = [field in cls.model_fields for cls in classes]
            support = [SUPPORT[cls.support(field)] if own else "–" for cls, own in zip(classes, has, strict=True)]
            parts = [
                (value_of(schema["properties"][field], schema), note_of(schema["properties"][field]))
                for schema, own in zip(schemas, has, strict=True)
                if own
            ]
            values, notes = (" / ".join(dict.fromkeys(filter(None, column))) for column in zip(*parts, strict=True))
            rows.append(f"| `{field}` | {escaped(values)} | {' | '.join(support)} | {escaped(notes)} |")
        return "\n".join(rows)

    return table


def note_of(part: dict[str, Any]) -> str:
    """Returns a field's description, without what the columns say already."""
    text = str(part.get("description", ""))
    if part.get("x-support") == "refused":
        return f"other values than {listed(map(json.dumps, part['x-neutral']))} are refused"
    if part.get("x-support") == "ignored":
        return f"{text.partition(': ')[2]} Other values than {listed(map(json.dumps, part['x-neutral']))} are named"
    return text.removeprefix("Accepted, but without effect: ")


def value_of(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """Returns a field's values in a few words, from its JSON schema: `number, 0 to 2`, `list of strings, at most
    16`."""
    options = part.get("anyOf") or part.get("oneOf")
    if options:
        kinds = (value_of(option, schema) for option in options if option.get("type") != "null")
        return "; or ".join(dict.fromkeys(kinds))
    if "$ref" in part:
        named = schema["$defs"][part["$ref"].rpartition("/")[2]]
        return value_of(named, schema) if "properties" not in named else "object"
    if len(part.get("enum", ())) > MOST_NAMES:
        return "string"
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    kind = str(part.get("type", "any"))
    if kind == "array":
        inner = value_of(part.get("items", {}), schema).partition(",")[0]
        kind = f"list of {inner}s" if " " not in inner else f"list of ({inner.replace('; or', ' or')})"
    return kind + bounds_of(part)


def bounds_of(part: dict[str, Any]) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    texts = [
        f"{number(low)} to {number(high)}" if low is not None and high is not None else "",
        f"at least {number(low)}" if high is None and low is not None else "",
        f"more than {number(part['exclusiveMinimum'])}" if "exclusiveMinimum" in part else "",
        f"at most {part['maxItems']:,}" if "maxItems" in part else "",
        f"at most {part['maxLength']:,} characters" if "maxLength" in part else "",
        f"at most {part['maxProperties']:,} keys" if "maxProperties" in part else "",
    ]
    return "".join(f", {text}" for text in texts if text)


def number(value: float) -> str:
    """Returns a bound; those of 32 and 64 bits as powers of two."""
    powers = {2**31 - 1: "2^31 - 1", 2**63 - 1: "2^63 - 1", -(2**63): "-2^63"}
    return powers.get(int(value)) or f"{value:g}"


# --- models, files, imports


def demo_models() -> str:
    """Returns the table of demo models in docs/models.md."""
    rows = ["| demo name | model | download | licence |", "|---|---|---|---|"]
    for name, demo in {**defined("DEMO_MODELS"), **defined("EMBEDDING_DEMOS")}.items():
        known = DEMOS[name]
        size = known.download or f"{demo.size / 1e6:.0f} MB"
        rows.append(f"| `{name}` | {known.title} | {size} | {known.licence} |")
    return "\n".join(rows)


def files() -> str:
    """Returns the list of packages and files in docs/architecture.md."""
    folders = {"The top level": ROOT} | {f"`{folder_of(name)}/`": folder for name, folder in packages().items()}
    lines = []
    for title, folder in folders.items():
        lines += [f"### {title}", ""]
        if folder != ROOT and (own := summary(folder / "__init__.py")):
            lines += [*textwrap.wrap(own, WIDTH), ""]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                text = f"* `{path.name}`: {summary(path)}"
                lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines.append("")
    return "\n".join(lines).rstrip()


def imports() -> str:
    """Returns which packages import which, also within packages that have packages."""
    parts = [picture(import_graph())]
    for package in sorted({name.partition(".")[0] for name in packages() if "." in name}):
        parts += [f"Inside `{package}/`:", picture(inner_graph(package))]
    return "\n\n".join(parts)


def picture(graph: dict[str, set[str]]) -> str:
    """Returns a line each, those that reach most first: if there is no circle, a line names only lines below it."""
    width = max(map(len, graph))
    lines = []
    for name in sorted(graph, key=lambda name: (-len(reached(graph, name)), name)):
        text = f"{name:<{width}}  ->  {', '.join(sorted(graph[name])) or '(nothing)'}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * (width + 6), break_on_hyphens=False)
    return "\n".join(["```text", *lines, "```"])


def import_graph() -> dict[str, set[str]]:
    """Each package with all that is in it, or file of the top level, and what it imports of the others."""
    return graph_of(modules(), unit)


def inner_graph(package: str) -> dict[str, set[str]]:
    """Returns what `import_graph` does for the packages in one; its own files count as one."""
    return graph_of((name for name in modules() if name.partition(".")[0] == package), folder_of)


def graph_of(names: Iterable[str], home: Callable[[str], str]) -> dict[str, set[str]]:
    inside = set(names)
    graph: dict[str, set[str]] = {}
    for module in inside:
        found = {home(name) for name in imported(module, modules()[module]) if name in inside}
        graph[home(module)] = graph.get(home(module), set()) | found - {home(module)}
    return graph


def unit(module: str) -> str:
    """Returns the outermost package of a module, or its file if it is on the top level."""
    name = module.partition(".")[0]
    return name if name in packages() else f"{name}.py"


def folder_of(module: str) -> str:
    """Returns the package that a module is in."""
    package = module if module in packages() else module.rpartition(".")[0]
    return package.replace(".", "/")


def imported(module: str, path: Path) -> Iterator[str]:
    """Yields the names of all modules that a file imports; of `from package import name`, that of the module `name`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in modules() else origin


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Returns all that `start` imports, also through others."""
    found, todo = set[str](), [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


# --- writing


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "fields": field_table("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"),
    "message fields": field_table("MessagesRequest", "CountTokensRequest"),
    "other fields": field_table("EmbeddingRequest", "RerankRequest", "TokenizeRequest", "DetokenizeRequest"),
    "cohere fields": field_table("CohereEmbedRequest", "CohereRerankRequest"),
    "ollama fields": field_table("OllamaChatRequest", "OllamaGenerateRequest", "OllamaEmbedRequest"),
    "ollama options": field_table("OllamaOptions"),
    "demo models": demo_models,
    "files": files,
    "imports": imports,
}


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "readme_zh.md", *sorted((ROOT / "docs").glob("*.md"))]


def wanted() -> dict[Path, str]:
    """Each document and .env.example as the code has it."""
    texts = {
        path: MARKED.sub(lambda m: f"{m[1]}\n{GENERATED[m[2]]()}\n\n{m[3]}", path.read_text(encoding="utf-8"))
        for path in documents()
    }
    return texts | {ROOT / ".env.example": env_example()}


def main() -> None:
    for path, text in wanted().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
