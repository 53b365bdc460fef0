"""What is seen of requests: metrics, logs and their secrets, traces."""

import io
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from process import MAIN, ROOT, Server, serve, until
from raw_http import JSON, Connection, request

from telemetry import logs, tracing
from telemetry.metrics import MAX_CODES, Metrics
from telemetry.request_record import RequestRecord

KEY = "sk-very-secret-0123456789"
MODEL = "Tiny-Qwen3"
SECRET = "a secret of the prompt"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "DTYPE": "float32", "LOG_FORMAT": "json"}
    with serve(MAIN, **settings, API_KEYS=f"alice:{KEY}") as server:
        server.wait_until_healthy()
        yield server


def ask(server: Server, path: str = "/v1/chat/completions", **body: Any) -> httpx2.Response:
    whole = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 6}
    whole |= {"temperature": 0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}", **body.pop("headers", {})}
    return httpx2.post(server.url + path, json={**whole, **body}, headers=headers, timeout=60)


def read(server: Server) -> dict[str, float]:
    """The series of /metrics."""
    answer = httpx2.get(server.url + "/metrics", headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def gained(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


def test_metrics_count_what_was_answered(server: Server) -> None:
    before = read(server)
    label = f'{{model_name="{MODEL}"}}'
    messages = [{"role": "user", "content": "What no other test asks, and long enough for a block of the cache."}]
    usage = ask(server, messages=messages).json()["usage"]
    again = ask(server, messages=messages, stream=True, stream_options={"include_usage": True}, n=2)
    *_, last, done, _ = again.text.split("\n\n")
    assert done == "data: [DONE]"
    cached = [said["prompt_tokens_details"]["cached_tokens"] for said in (usage, json.loads(last[6:])["usage"])]
    until(lambda: gained(before, read(server), f"llm_e2e_request_latency_seconds_count{label}") == 2)
    after = read(server)
    assert gained(before, after, f"llm_generation_tokens_total{label}") == 3 * usage["completion_tokens"] == 18
    assert gained(before, after, f"llm_prompt_tokens_total{label}") == 2 * usage["prompt_tokens"]
    assert gained(before, after, f"llm_prefix_cache_queries_total{label}") == 3 * usage["prompt_tokens"]
    assert gained(before, after, f"llm_prefix_cache_hits_total{label}") == cached[0] + 2 * cached[1]
    assert cached[1] >= (usage["prompt_tokens"] - 1) // 16 * 16 > 0
    assert gained(before, after, f'llm_request_success_total{{finished_reason="length",model_name="{MODEL}"}}') == 3
    for name, count in {
        "time_to_first_token_seconds": 2,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 3,
        "inter_token_latency_seconds": 15,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 2,
    }.items():
        assert gained(before, after, f"llm_{name}_count{label}") == count, name
    answered = 'llm_http_requests_total{code="200",method="POST",path="/v1/chat/completions"}'
    assert gained(before, after, answered) == 2
    assert after[f"llm_num_requests_running{label}"] == 0 and after[f"llm_kv_cache_blocks_total{label}"] > 0


def test_metrics_count_errors_and_those_who_left(server: Server) -> None:
    before = read(server)
    assert ask(server, model="nobody's").status_code == 404
    assert httpx2.get(server.url + "/v1/models").status_code == 401
    assert ask(server, timeout=1e-6, max_tokens=400).status_code == 504
    with httpx2.stream(
        "POST",
        server.url + "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True},
        headers={"authorization": f"Bearer {KEY}"},
    ) as answer:
        next(answer.iter_raw())
    left = f'llm_request_aborts_total{{model_name="{MODEL}"}}'
    until(lambda: gained(before, read(server), left) == 1)
    after = read(server)
    for code in ("model_not_found", "invalid_api_key", "request_timeout"):
        assert gained(before, after, f'llm_errors_total{{code="{code}"}}') == 1, code


MODELS = ("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "context_length_exceeded"),
        ({"max_tokens": 10**6}, "invalid_value"),
        ({"guided_regex": "("}, "invalid_value"),
        ({"timeout": 1e-6, "max_tokens": 400}, "request_timeout"),
    ],
)
def test_what_was_refused_is_no_request_of_the_models(server: Server, body: dict[str, Any], code: str) -> None:
    before, label = read(server), f'{{model_name="{MODEL}"}}'
    ask(server, **body)
    until(lambda: gained(before, read(server), f'llm_errors_total{{code="{code}"}}') == 1)
    after = read(server)
    assert [gained(before, after, f"llm_{name}_count{label}") for name in MODELS] == [0, 0, 0]
    assert gained(before, after, f"llm_request_aborts_total{label}") == 0


def test_a_client_that_left_was_told_of_no_error(server: Server) -> None:
    before, label = read(server), f'{{model_name="{MODEL}"}}'
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    headers = (*JSON, ("authorization", f"Bearer {KEY}"))
    with Connection(server.url) as connection:
        connection.send(request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers))
    answered = 'llm_http_requests_total{code="499",method="POST",path="/v1/chat/completions"}'
    until(lambda: gained(before, read(server), answered) == 1)
    after = read(server)
    assert gained(before, after, f"llm_request_aborts_total{label}") == 1
    assert [name for name in after if name.startswith("llm_errors_total") and gained(before, after, name)] == []


def test_endlessly_many_paths_and_codes_are_not_endlessly_many_series(server: Server) -> None:
    ask(server, "/v1/x0")
    before = len(read(server))
    for number in range(1, 30):
        ask(server, f"/v1/x{number}")
        httpx2.request(f"M{number}", server.url + "/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert len(read(server)) <= before + 3
    metrics = Metrics()
    for number in range(3 * MAX_CODES):
        metrics.failed(f"code{number}")
    assert metrics.text().count(b"llm_errors_total{") == MAX_CODES + 1


def test_every_metric_of_the_dashboard_is_there(server: Server) -> None:
    dashboard = (Path(__file__).parents[1] / "deploy" / "grafana.json").read_text()
    wanted = set(re.findall(r"\bllm_[a-z0-9_]+", dashboard)) - {"llm_provider"}
    ask(server)
    known = set(re.findall(r"^# TYPE (\S+)", Metrics().text().decode(), re.MULTILINE))
    known |= {re.sub(r"\{.*", "", name) for name in read(server)}
    whole = {name.removesuffix(end) for name in known for end in ("_bucket", "_sum", "_count", "_total")} | known
    missing = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in wanted} - whole
    assert not missing


def test_a_request_is_a_line_with_its_tokens_and_times_and_without_its_secrets(server: Server) -> None:
    ask(server)
    answer = ask(server, headers={"x-request-id": "mine-1"})
    httpx2.get(server.url + f"/v1/models?api_key={KEY}", headers={"authorization": "Bearer wrong-SECRET"})
    until(lambda: any('"mine-1"' in line for line in server.lines))
    (line,) = [json.loads(line) for line in server.lines if '"mine-1"' in line]
    assert (line["client"], line["model"], line["status"], line["path"]) == (
        "alice",
        MODEL,
        200,
        "/v1/chat/completions",
    )
    usage = answer.json()["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"] and line["completion_tokens"] == 6
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert 0 < line["first_token_seconds"] <= line["seconds"] and line["finish_reason"] == "length"
    text = "".join(server.lines)
    assert KEY not in text and SECRET not in text and "wrong-SECRET" not in text


def test_what_clients_write_is_never_a_line_of_its_own(server: Server) -> None:
    forged = "x\n2026-01-01 ERROR main: forged \x1b[31m"
    ask(server, model=forged)
    ask(server, user=forged, headers={"x-request-id": "a b\tc", "user-agent": "forged-agent"})
    ask(server, "/v1/%0aforged%1b[31m")
    time.sleep(0.3)
    assert all(json.loads(line) for line in server.lines if line.startswith("{"))
    assert not any(line.startswith("2026-01-01") or "\x1b" in line for line in server.lines)


@contextmanager
def logged(kind: str) -> Iterator[io.StringIO]:
    """What the log of requests writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.FORMATTERS[kind]())
    logs.access.addHandler(handler)
    logs.access.setLevel("INFO")
    try:
        yield stream
    finally:
        logs.access.removeHandler(handler)


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_a_line_is_one_line_whatever_is_in_it(kind: str) -> None:
    with logged(kind) as stream:
        seen = RequestRecord(request_id="r\n1", client="\x1b[31m", model="a\r\nb\u2028c\x00", error="e\x9b")
        logs.write(seen, "GET", "/x\n\x7f\u202e\u200b\ud800\U000e0001", 200)
        logs.access.info("%s", "\u202e")
    text = stream.getvalue()
    assert text.endswith("\n") and len(text.splitlines()) == 2 and text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "forged", ["/x 200 request_id=forged", '/x" 200 request_id="forged', "/x\\", "/x=1", "/x\u00a0status=200"]
)
def test_no_value_of_a_plain_line_looks_like_a_field_of_it(forged: str) -> None:
    with logged("plain") as stream:
        logs.write(RequestRecord(request_id="mine", model=forged, finish_reasons=["a b=c"]), "GET", forged, 404)
    line = stream.getvalue().partition(" access: ")[2]
    value = r'("(?:[^"\\]|\\.)*"|[^\s"=]+)'
    found = re.fullmatch(rf"GET {value} 404 request_id=mine (?:seconds={value} )?model={value} \S+={value}\n", line)
    assert found and json.loads(found[1]) == json.loads(found[3]) == forged


def test_a_line_with_plain_values_has_no_quotes() -> None:
    with logged("plain") as stream:
        logs.write(RequestRecord(request_id="r-1.x", model="org/Name-1.5:4b"), "POST", "/v1/chat/completions", 200)
    assert "POST /v1/chat/completions 200 request_id=r-1.x " in stream.getvalue()
    assert "model=org/Name-1.5:4b" in stream.getvalue() and '"' not in stream.getvalue()


@pytest.mark.parametrize("kind", ["plain", "json"])
def test_no_line_of_a_traceback_looks_like_one_of_the_log(kind: str) -> None:
    with logged(kind) as stream:
        try:
            raise ValueError("x\n2026-01-01 00:00:00,000 INFO access: forged\r2026 \x1b[31m\u2028\u202e")
        except ValueError:
            logs.access.exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    assert "it failed" in first and all(line.startswith("  ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest)) and "forged" in stream.getvalue()


TRACING = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
import main
from config import Settings
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

seen = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(seen))
trace.set_tracer_provider(provider)
os.environ["OTEL_TRACES_EXPORTER"] = "none"
app = main.create_app(Settings(_env_file=None, model_path={path!r}, dtype="float32"))
with TestClient(app) as client:
    while client.get("/health").status_code != 200:
        pass
    body = {{"model": "Tiny-Qwen3", "messages": [{{"role": "user", "content": "a secret"}}], "max_tokens": 4}}
    assert client.post("/v1/chat/completions?api_key=sk-secret&q=hello", json=body).status_code == 200
(span,) = [span for span in seen.get_finished_spans() if span.attributes.get("http.route", "").endswith("completions")]
print(span.attributes["gen_ai.request.model"], span.attributes["gen_ai.usage.output_tokens"])
assert "a secret" not in span.to_json()
assert "sk-secret" not in span.to_json() and "hello" not in span.to_json()
"""


def test_without_the_standard_variables_there_are_no_traces() -> None:
    assert not tracing.is_enabled() and tracing.span() is None and tracing.configuration()["tracing"] is False


def test_a_request_is_a_span_with_its_model_and_tokens(tiny_checkpoint: Path) -> None:
    code = TRACING.format(tests=str(ROOT / "tests"), root=str(ROOT), path=str(tiny_checkpoint))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout.split()[0] == MODEL, ended.stderr
    assert int(ended.stdout.split()[1]) >= 1


def test_a_span_has_no_query_by_any_name_of_the_address() -> None:
    old, new = {"http.target": "/v1/x?key=a", "http.url": "http://h/v1/x?key=a"}, {"url.full": "http://h/v1/x?key=a"}
    span = TracerProvider().get_tracer("test").start_span("x", attributes={**old, **new, "url.query": "key=a"})
    tracing.hide_query(span)
    assert span.attributes == {
        "http.target": "/v1/x",
        "http.url": "http://h/v1/x",
        "url.full": "http://h/v1/x",
        "url.query": tracing.HIDDEN,
    }
