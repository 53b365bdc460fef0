"""Settings come from flags, the environment and .env, in this order, and bad ones are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from process import ROOT
from pydantic import ValidationError, create_model

from config import Settings, is_open_to_network, provider_fields
from provider_table import ProviderRow
from setting_values import parse_bytes

READ = "import config; print(config.from_command_line(['--port', '3']).model_dump_json())"


def read(code: str, folder: Path, **environment: str) -> str:
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env={**path, **environment}, capture_output=True, text=True).stdout


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=1\nHOST=1.1.1.1\nLOG_LEVEL=debug\nUNKNOWN=x\n")
    settings = Settings.model_validate_json(read(READ, tmp_path, PORT="2", HOST="2.2.2.2"))
    assert (settings.port, settings.host, settings.log_level) == (3, "2.2.2.2", "debug")


@pytest.mark.parametrize("name", ["MODEL_PATH", "MODEL_DIR", "NANOVLLM_MODEL_PATH"])
def test_the_model_path_has_three_names(tmp_path: Path, name: str) -> None:
    code = "import config; print(config.Settings().model_path)"
    assert read(code, tmp_path, **{name: "/some/model"}) == "/some/model\n"


def test_the_model_path_flag_wins_over_every_name_in_the_environment(tmp_path: Path) -> None:
    code = "import config; print(config.from_command_line(['--model-path', '/flag']).model_path)"
    assert read(code, tmp_path, MODEL_PATH="/a", MODEL_DIR="/b", NANOVLLM_MODEL_PATH="/c") == "/flag\n"


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 2**32), ("4G", 2**32), ("1.5g", 3 * 2**29), ("512mb", 2**29), ("7", 7)]
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("bad", [{"port": 70000}, {"kv_cache_memory": "much"}, {"dtype": "int1"}, {"max_num_seqs": 0}])
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(bad)


def test_a_bad_setting_ends_the_server_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "main.py", "--port", "many"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.startswith("error: PORT") and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)]
)
def test_an_address_that_others_reach_is_recognised(host: str, is_open: bool) -> None:
    assert is_open_to_network(host) is is_open


def test_values_of_the_gateway_are_read_as_its_document_writes_them(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(
        "OLLAMA_API_KEY= # 如果您的 Ollama 服務需要 API 金鑰\nOLLAMA_TIMEOUT=120 # 秒\nDEEPSEEK_API_URL=https://a.example/v1\n"
        "OPENAI_API_KEY=sk-xxxxxxxx\nMINIMAX_API_KEY=m\nMODEL_ALIASES=a=openai/b, c=d\nMODEL_FALLBACKS=a=b,c;d=e\n"
    )
    settings = Settings(_env_file=env)
    assert settings.ollama_api_key is None and settings.ollama_timeout == 120
    assert settings.openai_api_key and settings.openai_api_key.get_secret_value() == "sk-xxxxxxxx"
    assert settings.minmax_api_key and "sk-xxxxxxxx" not in repr(settings)
    assert settings.model_aliases == {"a": "openai/b", "c": "d"}
    assert settings.model_fallbacks == {"a": ["b", "c"], "d": ["e"]}
    assert Settings(_env_file=None, ollama_api_key="# a comment").ollama_api_key is None
    for bad in ({"model_aliases": "x"}, {"model_fallbacks": "x="}, {"ollama_timeout": "soon"}):
        with pytest.raises(ValidationError):
            Settings(_env_file=None, **bad)


def test_a_row_brings_its_settings() -> None:
    row = ProviderRow(name="my-groq", default_url="https://api.groq.com/openai/v1")
    fields = provider_fields([row])
    assert list(fields) == ["my_groq_api_key", "my_groq_base_url"]
    more = create_model("More", __base__=Settings, **fields)(_env_file=None, my_groq_api_key="k", port=1)
    assert more.my_groq_base_url == row.default_url and more.my_groq_api_key.get_secret_value() == "k"
    assert "my-groq/" in type(more).model_fields["my_groq_api_key"].description


def test_providers_are_added_with_their_keys(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text(
        "PROVIDERS=groq=https://api.groq.com/openai/v1, my-own=http://localhost:1/ # two\n"
        "GROQ_API_KEY=from-file # a comment\nMY_OWN_API_KEY= # none\nOTHER_API_KEY=x\n"
    )
    groq, mine = Settings(_env_file=env).provider_values()[-2:]
    assert (groq.row.name, groq.url, mine.url) == ("groq", "https://api.groq.com/openai/v1", "http://localhost:1")
    assert groq.key and groq.key.get_secret_value() == "from-file" and mine.key is None
    assert "from-file" not in repr(Settings(_env_file=env))
    code = "import config; print(config.from_command_line([]).providers[0].key.get_secret_value())"
    assert read(code, tmp_path, GROQ_API_KEY="from-environment") == "from-environment\n"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("groq", "has no URL"),
        ("a_b=https://x", "letters, digits and dashes"),
        ("=https://x", "letters, digits and dashes"),
        ("groq=api.groq.com", "is not valid"),
        ("groq=https://", "is not valid"),
        ("a=https://x,a=https://y", "twice"),
        *((f"{name}=https://x", "is taken") for name in ("openai", "claude", "minimax", "huggingface", "models")),
    ],
)
def test_a_provider_that_cannot_be_added_is_refused_in_a_sentence(value: str, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as refusal:
        Settings(_env_file=None, providers=value)
    assert refusal.value.errors()[0]["loc"] == ("providers",)


@pytest.mark.parametrize("value", [",", " , ,", "#secret", "# a comment", " ;"])
def test_keys_that_are_none_do_not_open_the_server(value: str) -> None:
    with pytest.raises(ValidationError):
        Settings(_env_file=None, api_keys=value)


def test_a_server_whose_keys_are_none_ends_with_a_sentence() -> None:
    command, environment = [sys.executable, "main.py", "--port", "0"], {**os.environ, "API_KEYS": " , ,"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.startswith("error: API_KEYS: ") and "no key" in ended.stderr


@pytest.mark.parametrize("value", ["", "  "])
def test_without_keys_everybody_may_call(value: str) -> None:
    assert Settings(_env_file=None, api_keys=value).api_keys == ()


@pytest.mark.parametrize(
    "sizes", [{"max_body_memory": "1MiB"}, {"max_body_size": "1GiB"}, {"max_body_size": 2, "max_body_memory": 1}]
)
def test_a_body_that_may_be_sent_has_a_place(sizes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="MAX_BODY_SIZE"):
        Settings(_env_file=None, **sizes)
    assert Settings(_env_file=None, max_body_size="1GiB", max_body_memory="1GiB").max_body_size == 2**30
