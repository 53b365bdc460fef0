"""What lies in deploy/ fits the server: its settings, endpoints, files and metrics, and itself."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from process import PACKAGES, ROOT

from config import Settings
from main import create_app

DEPLOY = ROOT / "deploy"
SETTINGS = {name.upper() for name in Settings.model_fields}
OF_OTHERS = {"HOME", "PATH", "PYTHONUNBUFFERED", "TORCH_INDEX"}  # read by the system, Python, and the image's own steps
GRACE = Settings.model_fields["shutdown_timeout"].default

# --- the image

LINES = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE))
STEPS = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in LINES.splitlines() if line)]
LAST_STAGE = STEPS[max(i for i, (word, _) in enumerate(STEPS) if word == "FROM") :]


def of(word: str, steps: list[tuple[str, str]] = STEPS) -> list[str]:
    return [rest for found, rest in steps if found == word]


def from_context() -> list[str]:
    """What COPY takes from the repository."""
    copies = [rest.split()[:-1] for rest in of("COPY") if not rest.startswith("--from=")]
    return [source for sources in copies for source in sources]


def environment(steps: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.partition("=")[::2] for rest in of("ENV", steps) for pair in shlex.split(rest))


def test_the_image_has_every_module_and_nothing_that_is_not_there() -> None:
    files = {path for source in from_context() for path in ROOT.glob(source.rstrip("/"))}
    assert all(any(ROOT.glob(source.rstrip("/"))) for source in from_context())
    assert {*ROOT.glob("*.py"), *(ROOT / package for package in PACKAGES)} <= files


def test_what_the_image_takes_is_not_ignored_and_secrets_are() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in lines and not any(".env" in line for line in lines)
    assert {source.rstrip("/") for source in from_context()} <= {line[1:] for line in lines if line.startswith("!")}


def test_main_imports_nothing_that_the_image_lacks(tmp_path: Path) -> None:
    for source in from_context():
        for path in ROOT.glob(source.rstrip("/")):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    code = "import main; main.create_app(main.Settings()); import serving.loading; from api.routers import page"
    code += "; assert all((page.FOLDER / name).is_file() for name in page.FILES.values())"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=120).returncode == 0


def test_the_image_does_not_run_as_root_and_has_a_cache_that_its_user_owns() -> None:
    user = of("USER", LAST_STAGE)[-1]
    assert user.isdigit() and user != "0"
    assert LAST_STAGE.index(("USER", user)) < [word for word, _ in LAST_STAGE].index("ENTRYPOINT")
    home = environment(LAST_STAGE)["HOME"]
    assert home in of("VOLUME") and any(f"--uid {user} --home-dir {home} --create-home" in step for step in of("RUN"))
    assert environment(LAST_STAGE)["CACHE_DIR"].startswith(home)


def test_the_image_installs_what_is_locked_and_both_kinds_of_torch() -> None:
    install = next(step for step in of("RUN") if "pip install" in step)
    assert "--require-hashes --no-deps -r requirements.lock" in install and install.endswith("pip check")
    stages = dict(reversed(rest.split(" AS ")) for rest in of("FROM") if " AS " in rest)
    assert {"cpu", "cuda"} <= set(stages) and "VARIANT=cpu" in of("ARG")
    indexes = re.findall(r"whl/(\w+)", LINES)
    torch = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert indexes == ["cpu", "cu130"] and torch
    for document in ("README.md", "readme_zh.md", "docs/deployment.md"):
        command = f"pip install {torch[0]} --index-url https://download.pytorch.org/whl/{indexes[1]}"
        assert command in (ROOT / document).read_text(), document
    assert all(":" in image or image in {*stages, "${VARIANT}"} for image in (rest.split()[0] for rest in of("FROM")))


def test_signals_reach_the_server_of_the_image() -> None:
    command = json.loads(of("ENTRYPOINT")[-1])
    assert command == ["python", "main.py"] and of("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_is_healthy_when_health_says_so(tmp_path: Path) -> None:
    path = re.search(r"'GET', '(/\w+)'", of("HEALTHCHECK")[0])
    assert path and path[1] in create_app(Settings()).openapi()["paths"]
    code = json.loads(of("HEALTHCHECK")[0].partition(" CMD ")[2])[2]
    assert environment(LAST_STAGE)["HOST"] == "0.0.0.0"
    answers = {}
    for status in (200, 503):
        with answering(status) as port:
            answers[status] = subprocess.run([sys.executable, "-c", code], env={"PORT": port}, timeout=60).returncode
    assert answers == {200: 0, 503: 1}


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The port of a server that answers one request with a status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield str(server.server_port)
        thread.join()


# --- compose


def compose(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / name).read_text()))


def seconds(text: str) -> int:
    number, unit = int(text[:-1]), text[-1]
    return number * {"s": 1, "m": 60}[unit]


SERVICES = compose("compose.yaml")["services"]


def test_compose_builds_the_image_and_gives_it_time_to_end() -> None:
    build = SERVICES["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    asked = SERVICES["server"]["environment"]
    assert seconds(SERVICES["server"]["stop_grace_period"]) > int(asked["SHUTDOWN_TIMEOUT"]) + 5
    cuda = compose("compose.cuda.yaml")["services"]["server"]
    assert {build["args"]["VARIANT"], cuda["build"]["args"]["VARIANT"]} == {"cpu", "cuda"}
    assert build["args"].keys() <= {argument.split("=")[0] for argument in of("ARG")}


def test_open_webui_reaches_the_server_with_its_key_when_it_is_healthy() -> None:
    webui, server = SERVICES["open-webui"], SERVICES["server"]
    url = re.fullmatch(r"http://([\w-]+):(\d+)/v1", webui["environment"]["OPENAI_API_BASE_URL"])
    assert url and url[1] in SERVICES and url[2] == environment(LAST_STAGE)["PORT"] == of("EXPOSE")[0]
    assert server["environment"]["API_KEYS"].endswith(webui["environment"]["OPENAI_API_KEY"])
    assert webui["depends_on"] == {"server": {"condition": "service_healthy"}} and of("HEALTHCHECK")
    assert re.search(r":v?\d+\.\d+\.\d+$", webui["image"])


def test_compose_listens_on_this_machine_alone_and_keeps_what_it_must() -> None:
    named = compose("compose.yaml")["volumes"]
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(named)
    assert SERVICES["server"]["volumes"] == [f"models:{environment(LAST_STAGE)['HOME']}"]


def test_compose_has_no_secret_of_its_own_and_the_example_names_each() -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    optional = set(re.findall(r"\$\{(\w+):-", (DEPLOY / "compose.yaml").read_text()))
    example = (DEPLOY / "compose.env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == wanted == {"SERVER_KEY", "WEBUI_SECRET_KEY"}
    assert set(re.findall(r"^#(\w+)=", example, re.MULTILINE)) == optional


# --- systemd

UNIT = (DEPLOY / "gemma3-server.service").read_text()
KEYS = re.findall(r"^(\w+)=(.*)$", UNIT, re.MULTILINE)
KNOWN = set(
    """
    Description Documentation Wants After StartLimitIntervalSec StartLimitBurst WantedBy
    Type WorkingDirectory ExecStart Environment EnvironmentFile Restart RestartSec KillMode TimeoutStopSec
    DynamicUser CacheDirectory CacheDirectoryMode UMask LimitNOFILE DevicePolicy
    NoNewPrivileges CapabilityBoundingSet AmbientCapabilities LockPersonality MemoryDenyWriteExecute
    PrivateDevices PrivateTmp ProcSubset ProtectClock ProtectControlGroups ProtectHome ProtectHostname
    ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem
    RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID
    SystemCallArchitectures SystemCallFilter
    """.split()
)


def unit(key: str) -> list[str]:
    return [value for name, value in KEYS if name == key]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """In its own opinion, where it is installed; the paths are another machine's, so they are put right."""
    assert re.findall(r"^\[(\w+)\]$", UNIT, re.MULTILINE) == ["Unit", "Service", "Install"]
    assert {name for name, _ in KEYS} <= KNOWN
    if program := shutil.which("systemd-analyze"):
        own = UNIT.replace("/opt/gemma3-server/.venv/bin/python", sys.executable)
        (tmp_path / "gemma3-server.service").write_text(own)
        found = subprocess.run(
            [program, "verify", "--man=no", str(tmp_path / "gemma3-server.service")], capture_output=True, text=True
        )
        assert "gemma3-server" not in found.stderr and found.returncode == 0, found.stderr


def test_the_unit_does_not_run_as_root_and_ends_after_the_server() -> None:
    assert unit("DynamicUser") == ["yes"] and unit("CacheDirectory") and unit("EnvironmentFile")
    assert int(unit("TimeoutStopSec")[0]) > GRACE + 5
    assert unit("Restart") == ["on-failure"] and unit("KillMode") == ["mixed"]
    assert unit("ExecStart")[0].endswith(" main.py")


def test_the_unit_leaves_the_compiler_and_cuda_what_they_need() -> None:
    for key in ("MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock"):
        assert unit(key) == ["no"], key
    assert unit("ProcSubset") == ["all"] and unit("NoNewPrivileges") == ["yes"]
    assert unit("ProtectSystem") == ["strict"] and unit("CapabilityBoundingSet") == [""]


# --- all of them


def test_every_variable_that_is_set_means_something() -> None:
    names = {
        "Dockerfile": set(environment(STEPS)),
        "compose.yaml": set(SERVICES["server"]["environment"]),
        "unit": {pair.partition("=")[0] for value in unit("Environment") for pair in value.split()},
    }
    for place, found in names.items():
        assert found and found <= SETTINGS | OF_OTHERS, place


# --- what Prometheus and Grafana read

METRICS = {  # name -> its labels
    **dict.fromkeys(
        (
            "llm_num_requests_running",
            "llm_num_requests_waiting",
            "llm_kv_cache_usage_ratio",
            "llm_kv_cache_blocks_used",
            "llm_kv_cache_blocks_total",
            "llm_prompt_tokens_total",
            "llm_generation_tokens_total",
            "llm_prefix_cache_queries_total",
            "llm_prefix_cache_hits_total",
            "llm_request_aborts_total",
            "llm_num_preemptions_total",
            "llm_failed_steps_total",
        ),
        {"model_name"},
    ),
    "llm_request_success_total": {"model_name", "finish_reason"},
    **{
        f"{name}_bucket": {"model_name", "le"}
        for name in (
            "llm_time_to_first_token_seconds",
            "llm_inter_token_latency_seconds",
            "llm_e2e_request_latency_seconds",
            "llm_request_queue_time_seconds",
            "llm_request_prompt_tokens",
            "llm_request_generation_tokens",
        )
    },
    "llm_http_requests_total": {"method", "path", "code"},
    "llm_errors_total": {"code"},
    "llm_http_connections": set(),
    "llm_provider_requests_total": {"provider", "code"},
    "llm_provider_request_seconds_bucket": {"provider", "le"},
    **dict.fromkeys(
        (
            "process_resident_memory_bytes",
            "process_cpu_seconds_total",
            "process_open_fds",
            "process_max_fds",
        ),
        set(),
    ),
}
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_asks_for_metrics_and_labels_that_exist(expression: str) -> None:
    asked = re.findall(r"\b((?:llm|process)_\w+)\{(.*?)\}", expression)
    assert asked and len(asked) == len(re.findall(r"\b(?:llm|process)_\w+", expression))
    labels = set(re.findall(r"\bby \((.*?)\)", expression))
    for name, matchers in asked:
        used = set(re.findall(r"(\w+)=~?\"", matchers)) | {part.strip() for text in labels for part in text.split(",")}
        assert used - {"instance"} <= METRICS[name], name


def test_the_dashboard_shows_every_metric_of_the_server() -> None:
    assert set(METRICS) == {name for text in EXPRESSIONS for name in re.findall(r"\b((?:llm|process)_\w+)\{", text)}


def test_the_panels_do_not_overlap_and_have_one_data_source_that_is_chosen() -> None:
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in PANELS]
    assert all(x >= 0 and x + w <= 24 for x, _, w, _ in places)
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(places, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert {panel["datasource"]["uid"] for panel in PANELS if "datasource" in panel} == {"${datasource}"}
    assert set(re.findall(r"\$(\w+)", "".join(EXPRESSIONS))) <= {*variables, "__rate_interval"}


def test_prometheus_asks_with_a_key_from_a_file() -> None:
    (job,) = compose("prometheus.yml")["scrape_configs"]
    assert job["authorization"]["type"] == "Bearer" and job["authorization"]["credentials_file"].startswith("/")
    assert job["metrics_path"] == "/metrics"
