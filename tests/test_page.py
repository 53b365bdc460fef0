"""The chat page at /: what the server sends of it. What it does in a browser is in page/: `make test-page`."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from process import MAIN, Server, serve
from raw_http import Connection

from api.routers.page import FILES, FOLDER

TEXTS = {name: (FOLDER / name).read_text() for name in FILES.values()}
SCRIPTS = [name for name in TEXTS if name.endswith(".js")]
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing is fetched from


@pytest.fixture(scope="module")
def guarded(tiny_checkpoint: Path) -> Iterator[Server]:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32", API_KEYS="sk-0123456789abcdefABCDEF") as server:
        yield server


# --- over HTTP


def test_the_table_names_every_file_of_the_folder_and_no_other() -> None:
    assert sorted(FILES.values()) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", FILES)
def test_each_file_comes_whole_with_its_type_and_may_be_neither_guessed_nor_framed(server: Server, path: str) -> None:
    answer = server.get(path)
    assert answer.status_code == 200 and answer.content == (FOLDER / FILES[path]).read_bytes()
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].partition(";")[0] == kinds[FILES[path].rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-cache"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:" and "unsafe" not in str(policy)


@pytest.mark.parametrize("path", FILES)
def test_head_has_the_same_headers_and_no_body(server: Server, path: str) -> None:
    whole, head = server.get(path), httpx2.head(server.url + path)
    assert head.status_code == 200 and head.content == b""
    own = {"date", "x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in whole.headers.items() if k not in own
    }


def test_a_file_that_the_browser_has_is_not_sent_again(server: Server) -> None:
    tag = server.get("/page/main.js").headers["etag"]
    for known, status in ((tag, 304), (f'"other", W/{tag}', 304), ("*", 304), ('"other"', 200), ("", 200)):
        answer = httpx2.get(server.url + "/page/main.js", headers={"if-none-match": known})
        assert answer.status_code == status and bool(answer.content) == (status == 200), known
        assert answer.headers["etag"] == tag and "content-security-policy" in answer.headers
    assert server.get("/page/chat.js").headers["etag"] != tag


@pytest.mark.parametrize(
    "path",
    [
        *("/page", "/page/", "/page/index.html", "/page/main.js/", "/page//main.js", "//", "/page/nothing.js"),
        *("/page/../routers/page.py", "/page/..%2frouters%2fpage.py", "/page/%2e%2e/routers/page.py", "/page/.."),
        *("/page/..%5c..%5cmain.py", "/page/%2fetc%2fpasswd", "/page//etc/passwd", "/page/main.js%00", "/PAGE/main.js"),
    ],
)
def test_no_other_path_leads_to_a_file(server: Server, path: str) -> None:
    with Connection(server.url) as connection:
        reply = connection.ask("GET", path)
    assert reply.status == 404 and reply.json["error"]["message"].endswith("/docs shows those that do.")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_page_is_only_read(server: Server, method: str) -> None:
    answer = httpx2.request(method, server.url + "/")
    assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_the_page_needs_no_key_and_what_it_asks_for_does(guarded: Server) -> None:
    for path in FILES:
        assert guarded.get(path).status_code == httpx2.head(guarded.url + path).status_code == 200
        assert httpx2.post(guarded.url + path).status_code == 401
    for path in (
        "/v1/models",
        "/page/nothing.js",
        "/page/",
        "/page",
        "//",
        "/page/../v1/models",
        "/v1/chat/completions",
    ):
        assert guarded.get(path).status_code == 401, path


def test_health_says_how_much_of_the_cache_is_used_as_metrics_do(server: Server) -> None:
    series = dict(line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if line[0] != "#")
    health = server.get("/health").json()
    assert health["kv_blocks_total"] == float(series['llm_kv_cache_blocks_total{model_name="Tiny-Qwen3"}']) > 0
    assert 0 <= health["kv_blocks"] <= health["kv_blocks_total"]


# --- what is in the files


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_names_an_address_outside(name: str) -> None:
    addresses = re.findall(r"\b(?:https?|wss?|ftp)://[\w.[]\S*", TEXTS[name])
    assert set(addresses) <= {f'{NAMESPACE}"'} and not re.search(r"""["'(]//\w""", TEXTS[name])


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_has_neither_scripts_nor_styles_inside_it_and_names_files_of_the_table() -> None:
    elements = Elements(TEXTS["index.html"]).found
    assert not any(name.startswith("on") or name == "style" for _, attributes in elements for name in attributes)
    assert not any(tag == "style" for tag, _ in elements)
    named = [attributes[name] for _, attributes in elements for name in ("src", "href") if name in attributes]
    assert all("src" in attributes for tag, attributes in elements if tag == "script")
    assert {f"/{name}" for name in named if name and not name.startswith("#")} <= FILES.keys()
    assert not any(str(name).startswith("/") for name in named), "a proxy may serve the page below a prefix"


def test_every_field_has_a_label_and_every_id_is_there_once() -> None:
    elements = Elements(TEXTS["index.html"]).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for tag, attributes in elements if tag == "label"}
    fields = {attributes["id"] for tag, attributes in elements if tag in ("input", "select", "textarea")}
    assert fields - labelled == {"file"}, "which a button opens"
    used = {name for script in SCRIPTS for name in re.findall(r'byId\("([\w-]+)"\)', TEXTS[script])}
    assert used and used <= set(ids)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_no_markup_and_no_code_of_texts_and_import_files_of_the_table(name: str) -> None:
    text = TEXTS[name]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", text)
    imported = re.findall(r'from "\./([\w.]+)"', text)
    assert set(imported) <= TEXTS.keys() and len(imported) == len(re.findall(r"^import ", text, re.MULTILINE))
    assert all(len(line) <= 120 for line in text.splitlines())


def test_links_of_models_lead_to_the_web_alone_and_do_not_tell_where_they_were() -> None:
    assert 'rel: "noopener noreferrer"' in TEXTS["markdown.js"]
    assert len(re.findall(r"https\?://", TEXTS["markdown.js"])) == 2 and "javascript:" not in TEXTS["markdown.js"]
