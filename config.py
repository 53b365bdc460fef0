"""Settings: what can be set, by command line, environment or `.env`, in this order. It knows nothing of their use."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict

_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def parse_bytes(value: Any) -> Any:
    """`"4GiB"`, `"4G"`, `"512m"` or a plain number -> bytes."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().removesuffix("b").removesuffix("i")
    unit = _UNITS.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmgt")) * unit)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a size: write one such as 4GiB, 512MiB or 1000000") from None


def without_comment(value: Any) -> Any:
    """Some readers of .env files keep what follows ` #`."""
    if not isinstance(value, str):
        return value
    text = re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()
    return text or None


def parse_pairs(value: Any) -> Any:
    """`"a=b,c=d"` -> {"a": "b", "c": "d"}"""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in (without_comment(value) or "").split(",") if pair.strip()]
    if not all(equals and name.strip() and other.strip() for name, equals, other in pairs):
        raise ValueError(f"{value!r} is not a list such as name=other,name=other")
    return {name.strip(): other.strip() for name, _, other in pairs}


def parse_fallbacks(value: Any) -> Any:
    """`"a=b,c;d=e"` -> {"a": ["b", "c"], "d": ["e"]}"""
    if not isinstance(value, str):
        return value
    rows = [row.partition("=") for row in (without_comment(value) or "").split(";") if row.strip()]
    if not all(equals and name.strip() and others.strip() for name, equals, others in rows):
        raise ValueError(f"{value!r} is not a list such as name=other,another;name=other")
    return {name.strip(): [other.strip() for other in others.split(",") if other.strip()] for name, _, others in rows}


@dataclass(frozen=True)
class ApiKey:
    """Who may call this server, and how much."""

    name: str
    secret: SecretStr
    requests_per_minute: float | None = None
    concurrent: int | None = None  # requests at a time


def parse_api_keys(value: Any) -> Any:
    """`"alice:sk-1;rpm=60;concurrent=4,sk-2"` -> ApiKeys; one without a name is called by its number."""
    if not isinstance(value, str):
        return value
    rows = [row.strip() for row in (without_comment(value) or "").split(",") if row.strip()]
    if value.strip() and not rows:
        raise ValueError("it has no key in it: unset API_KEYS to let everyone call")
    return tuple(_api_key(row, f"key{number}") for number, row in enumerate(rows, 1))


def _api_key(row: str, default: str) -> ApiKey:
    own, *limits = row.split(";")
    name, colon, secret = own.partition(":")
    given = dict(limit.strip().split("=", 1) for limit in limits if "=" in limit)
    try:
        if not set(given) <= {"rpm", "concurrent"} or len(given) != len(limits):
            raise ValueError
        rate, concurrent = float(given.get("rpm", 1)), int(given.get("concurrent", 1))
        if not (rate >= 1 and concurrent >= 1 and (secret if colon else name)):
            raise ValueError
    except ValueError:  # without the value, which is secret
        raise ValueError(
            f"the entry {default} must have the form [name:]key[;rpm=N][;concurrent=N], with N at least 1"
        ) from None
    return ApiKey(
        name if colon else default,
        SecretStr(secret if colon else name),
        rate if "rpm" in given else None,
        concurrent if "concurrent" in given else None,
    )


Key = Annotated[SecretStr | None, BeforeValidator(without_comment)]
Url = Annotated[Annotated[str, Field(pattern=r"^https?://")] | None, BeforeValidator(without_comment)]
Seconds = Annotated[float, BeforeValidator(without_comment), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Settings(BaseSettings):
    """All settings; frozen. `.env.example` and the README list them with their meaning."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        cli_kebab_case=True,
        cli_prog_name="python main.py",
        populate_by_name=True,
    )

    model_path: str | None = Field(
        None,
        validation_alias=AliasChoices("model_path", "model_dir", "nanovllm_model_path"),
        description="the model to serve: a directory, a .gguf file, a Hub id or a demo name",
    )
    served_model_name: str | None = Field(
        None, description="the model's id under /v1/models; default: the base name of MODEL_PATH"
    )
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="the port to listen on; 0 takes a free one")
    cors_allow_origins: Annotated[list[str] | None, NoDecode] = Field(
        None, description="the origins whose web pages may call, comma-separated, or *; default: localhost only"
    )
    cache_dir: Path = Field(
        Path("~/.cache/gemma3-server"),
        description="the directory for demo models, converted GGUF files and the results of the check at start",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the lowest level that is logged"
    )
    log_format: Literal["plain", "json"] = Field(
        "plain", description="the format of the log, with one line per request"
    )
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(parse_api_keys)] = Field(
        (),
        description=(
            "the keys that may call: [name:]key[;rpm=N][;concurrent=N], comma-separated; default: no key is needed"
        ),
    )
    max_body_size: Bytes = Field(
        32 * 2**20, description="the largest request body in bytes, such as 32MiB; a larger one gets a 413"
    )
    max_body_memory: Bytes = Field(
        512 * 2**20, description="the bytes that all request bodies in progress may take; more get a 503"
    )
    max_header_size: Bytes = Field(
        64 * 2**10, description="the largest size of a request's headers in bytes; larger ones get a 431"
    )
    max_connections: int = Field(1000, gt=0, description="the largest number of connections at a time; more get a 503")
    header_timeout: Seconds = Field(
        60.0, description="the seconds within which a request's headers must arrive, also on a new connection"
    )
    body_timeout: Seconds = Field(
        60.0, description="the seconds within which a request's body must arrive, plus one for every 10 kB of it"
    )
    write_timeout: Seconds = Field(
        60.0, description="the seconds for which a client may read nothing of its answer; then its connection is closed"
    )
    request_timeout: float | None = Field(
        None, gt=0, description="the seconds that an answer may take; default: no limit"
    )
    max_images: int = Field(16, ge=0, description="the largest number of images in one request; more get a 400")
    allow_private_image_urls: bool = Field(False, description="whether images may be fetched from private addresses")
    image_url_hosts: Annotated[list[str] | None, NoDecode] = Field(
        None, description="the only hosts that images may be fetched from, comma-separated; default: all public hosts"
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="the seconds that running requests get to finish after a signal to stop"
    )

    hf_token: Key = Field(None, description="the Hub's token, for gated and private models")
    huggingface_memory: Bytes = Field(
        16 * 2**30, description="the bytes that the weights of a huggingface/ chat model may take"
    )
    huggingface_idle: float = Field(
        600.0, gt=0, description="the seconds without requests after which a huggingface/ model is unloaded"
    )
    openai_api_key: Key = Field(None, description="the API key for openai/ and for bare gpt-* and text-embedding-*")
    openai_base_url: Url = Field("https://api.openai.com/v1", description="the base URL of openai/")
    google_api_key: Key = Field(None, description="the API key for gemini/ and models/")
    gemini_base_url: Url = Field(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        description="the base URL of gemini/, which is Google's OpenAI-compatible one",
    )
    anthropic_api_key: Key = Field(None, description="the API key for claude/")
    anthropic_base_url: Url = Field("https://api.anthropic.com", description="the base URL of claude/")
    anthropic_default_max_tokens: int = Field(
        4096, gt=0, description="the max_tokens of a request to claude/ that has none"
    )
    deepseek_api_key: Key = Field(None, description="the API key for deepseek/")
    deepseek_api_url: Url = Field("https://api.deepseek.com", description="the base URL of deepseek/, for streams")
    deepseek_api_endpoint_nonstream: Url = Field(
        None,
        description=("the whole URL of deepseek/ for answers that are not streamed; default: the same as for streams"),
    )
    minmax_api_key: Key = Field(
        None,
        validation_alias=AliasChoices("minmax_api_key", "minimax_api_key"),
        description="the API key for minmax/ and minimax/",
    )
    minmax_api_url: Url = Field(
        "https://api.minimax.io/v1", description="the base URL of minmax/ that ends in /v1, or its whole URL"
    )
    ollama_baseurl: Url = Field("http://localhost:11434", description="the base URL of ollama/")
    ollama_api_key: Key = Field(None, description="the API key for ollama/, if it needs one")
    ollama_timeout: Seconds = Field(
        120.0,
        description="the seconds for which ollama/ may send nothing, and which an answer that is not streamed may take",
    )
    gateway_timeout: Seconds = Field(
        120.0,
        description="the seconds for which another provider may send nothing; a whole answer may take 600",
    )
    gateway_max_retries: int = Field(
        2, ge=0, le=10, description="the number of retries after a provider's transient failures"
    )
    model_aliases: Annotated[dict[str, str], NoDecode, BeforeValidator(parse_pairs)] = Field(
        {}, description="other names for models: name=other,name=other"
    )
    model_fallbacks: Annotated[dict[str, list[str]], NoDecode, BeforeValidator(parse_fallbacks)] = Field(
        {}, description="the models that answer when a provider cannot: name=other,another;name=other"
    )

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="the data type of the weights and the KV cache"
    )
    device_map: str = Field(
        "auto", description="the devices, as in accelerate: auto, cpu, cuda:0, balanced, sequential"
    )
    quantization: Literal["auto", "none", "int8", "int4", "nf4", "bnb-8bit", "bnb-4bit"] = Field(
        "auto", description="the format of the weights; auto on CPU: a GGUF file's own or int8, else none"
    )
    max_model_len: int | None = Field(
        None, gt=0, description="the largest number of tokens of prompt and answer together; default: the model's own"
    )
    max_num_seqs: int | None = Field(
        None, gt=0, description="the largest number of sequences in a batch; default: 32 on CPU, 256 on GPU"
    )
    max_num_batched_tokens: int | None = Field(
        None, gt=0, description="the most tokens in a step that only reads prompts; default: 512 on CPU, 8192 on GPU"
    )
    max_num_mixed_tokens: int | None = Field(
        None, gt=0, description="the most tokens in a step that also generates answers; default: 64 on CPU, 2048 on GPU"
    )
    max_queued_requests: int = Field(1024, gt=0, description="the number of answers in the queue; more get a 503")
    max_queued_tokens: int = Field(2**20, gt=0, description="the number of prompt tokens in the queue; more get a 503")
    kv_cache_memory: Bytes | None = Field(
        None, description="the bytes of the KV cache, such as 4GiB; default: from free memory"
    )
    kv_block_size: int | None = Field(
        None,
        gt=0,
        description="the tokens in a block of the KV cache; default: 16, or 256 if a GPU's kernels need that",
    )
    num_speculative_tokens: int = Field(
        8,
        ge=0,
        description=(
            "the tokens that are guessed from the text so far or by a draft model and checked at once; 0 turns this off"
        ),
    )
    draft_model_path: str | None = Field(
        None, description="a smaller model with the same vocabulary that guesses tokens, in a form of MODEL_PATH"
    )

    embedding_model_path: str | None = Field(
        None, description="an embedding model to load at the start: a directory, a Hub id or a demo name"
    )
    embedding_memory: Bytes = Field(
        4 * 2**30, description="the bytes that the weights of all embedding models may take, such as 4GiB"
    )
    embedding_device: str = Field("auto", description="the device of embedding models: auto, cpu, cuda or cuda:0")
    embed_truncate: Literal["end", "error"] = Field("end", description="what happens to a text that is too long")
    embed_default_prompt: str | None = Field(
        None, description="the name of the prompt for requests that name none, for models that have it"
    )
    embed_token_arrays: Literal["cl100k", "own", "refuse"] = Field(
        "cl100k", description="how token ids in an input are read: as OpenAI's, as the model's own, or not at all"
    )
    allow_truncated_dims: bool = Field(
        False,
        description="whether a request's dimensions may shorten the vectors of models that were not trained for that",
    )

    @field_validator("cors_allow_origins", "image_url_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("max_body_memory")
    @classmethod
    def _hold_a_body(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("max_body_size", 0):
            raise ValueError("it is less than MAX_BODY_SIZE, so a body of that size would never be accepted: raise it")
        return value

    @field_validator("cache_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    def url(self, name: str) -> str:
        """Of a provider, without a slash at its end; the default for one that is empty."""
        return str(getattr(self, name) or type(self).model_fields[name].default).rstrip("/")


def is_open_to_network(host: str) -> bool:
    """Whether other machines can reach a server that listens on `host`."""
    return host not in ("localhost", "::1") and not host.startswith("127.")


def from_command_line(arguments: list[str] | None = None) -> Settings:
    """Settings with command line flags on top (`--model-path PATH --host H --port P ...`); exits on bad ones."""
    return CliApp.run(Settings, cli_args=arguments)
