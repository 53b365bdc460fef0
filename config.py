"""Settings: what can be set, by command line, environment or `.env`, in this order. It knows nothing of their use."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from engine import quantization
from provider_table import DEFAULT_MAX_TOKENS, PROVIDERS, ProviderRow, ProviderSetting, SettingKind
from setting_values import (
    AddedProvider,
    ApiKey,
    UnreadProviders,
    parse_api_keys,
    parse_bytes,
    parse_fallbacks,
    parse_pairs,
    parse_providers,
    without_comment,
)

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


@dataclass(frozen=True, kw_only=True)
class ProviderValues:
    """What is set for one provider."""

    row: ProviderRow
    url: str  # without a slash at its end
    whole_url: str | None  # of chats that are not streamed, if it is another one
    key: SecretStr | None
    timeout: float  # seconds between bytes
    total_timeout: float  # seconds for an answer that is not streamed
    num_retries: int
    max_tokens: int  # of a request that has no limit, where one must have it


Key = Annotated[SecretStr | None, BeforeValidator(without_comment)]
Url = Annotated[Annotated[str, Field(pattern=r"^https?://")] | None, BeforeValidator(without_comment)]
Seconds = Annotated[float, BeforeValidator(without_comment), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
if TYPE_CHECKING:
    QuantizationName = str
else:
    QuantizationName = Literal[quantization.SETTINGS]  # so that --help and the error message list them


class ServerSettings(BaseSettings):
    """The settings of the server itself, which those of the providers and of the models follow."""

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
        description=(
            "the model to serve: a directory, a .gguf file, a Hub id or a demo name, or several of these, "
            "comma-separated; default: the first one in MODELS_DIR, else ~/llms/Qwen3-0.6B/ if that exists, else "
            "demo:qwen2.5-coder-0.5b"
        ),
    )
    models_dir: Path | None = Field(
        None, description="a folder: every model directory and .gguf file below it is served, loaded when asked for"
    )
    models_memory: Bytes | None = Field(
        None,
        description=(
            "the bytes that the weights and caches of all chat models may take; default: 90 % of the GPUs' memory, or "
            "of what is free without one"
        ),
    )
    model_idle: float | None = Field(
        None,
        gt=0,
        description=(
            "the seconds without requests after which a chat model is unloaded; default: 600, and never for the first "
            "model"
        ),
    )
    model_load_wait: float = Field(
        30.0, ge=0, description="the seconds that a request waits for its model to load before it gets a 503"
    )
    served_model_name: str | None = Field(
        None, description="the first model's id under /v1/models; default: the base name of MODEL_PATH"
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
    response_store: str = Field(
        "memory",
        description=(
            "where /v1/responses stores its answers: memory, or the path of an SQLite file, which survives a restart"
        ),
    )
    response_store_size: Bytes = Field(
        64 * 2**20, description="the bytes that stored responses may take; the least recently used are forgotten first"
    )
    max_stored_responses: int = Field(10_000, ge=0, description="the number of stored responses; 0 stores none")
    max_background_responses: int = Field(
        64, ge=0, description="the number of responses that are made in the background at a time; more get a 503"
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="the seconds that running requests get to finish after a signal to stop"
    )

    hf_token: Key = Field(None, description="the Hub's token, for gated and private models")
    huggingface_idle: float | None = Field(
        None, gt=0, description="the same as MODEL_IDLE, for huggingface/ models alone; default: MODEL_IDLE"
    )
    huggingface_memory: Bytes = Field(
        16 * 2**30, description="the bytes that the weights of a huggingface/ chat model may take"
    )


def provider_fields(rows: Iterable[ProviderRow]) -> dict[str, Any]:
    """Returns the fields of these providers' settings, as pydantic's `create_model` takes them."""
    annotations: dict[SettingKind, Any] = {
        "key": Key,
        "url": Url,
        "whole_url": Url,
        "timeout": Seconds,
        "max_tokens": Annotated[int, Field(gt=0)],
    }
    fields: dict[str, Any] = {}
    for setting in (setting for row in rows for setting in row.settings):
        alias = AliasChoices(setting.name, setting.alias) if setting.alias else None
        info = Field(setting.default, validation_alias=alias, description=setting.description)
        fields[setting.name] = (annotations[setting.kind], info)
    return fields


if TYPE_CHECKING:
    ProviderSettings = ServerSettings
else:
    ProviderSettings = create_model("ProviderSettings", __base__=ServerSettings, **provider_fields(PROVIDERS))


class Settings(ProviderSettings):
    """All settings; frozen. `make docs` lists them in docs/settings.md and `.env.example`."""

    providers: Annotated[tuple[AddedProvider, ...], NoDecode, BeforeValidator(parse_providers)] = Field(
        (),
        description=(
            "more providers of OpenAI's protocol: name=URL,name=URL; NAME_API_KEY has the key of each, if it needs one"
        ),
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
        "auto", description="the data type of the weights and, if KV_CACHE_DTYPE=auto, of the KV cache"
    )
    device_map: str = Field(
        "auto", description="the devices, as in accelerate: auto, cpu, cuda:0, balanced, sequential"
    )
    quantization: QuantizationName = Field(
        "auto", description="the format of the weights; auto on CPU: a quantised file's own or int8, else none"
    )
    max_model_len: int | None = Field(
        None, gt=0, description="the largest number of tokens of prompt and answer together; default: the model's own"
    )
    max_num_seqs: int | None = Field(
        None, gt=0, description="the most sequences in a batch; default: 256 on GPU, 16 to 256 by the speed of a CPU"
    )
    max_num_batched_tokens: int | None = Field(
        None, gt=0, description="the most tokens in a step that only reads prompts; default: 512 on CPU, 8192 on GPU"
    )
    max_num_mixed_tokens: int | None = Field(
        None,
        gt=0,
        description="the most tokens in a step that also generates answers; default: 256 on CPU, 2048 on GPU",
    )
    max_queued_requests: int = Field(1024, gt=0, description="the number of answers in the queue; more get a 503")
    max_queued_tokens: int = Field(2**20, gt=0, description="the number of prompt tokens in the queue; more get a 503")
    kv_cache_memory: Bytes | None = Field(
        None, description="the bytes of the KV cache, such as 4GiB; default: from free memory"
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description=(
            "the format of the KV cache: auto is the data type of the model; int8 holds about twice the tokens in the "
            "same memory, with a scale for each token and head"
        ),
    )
    snapshot_memory: Bytes | None = Field(
        None,
        description=(
            "the bytes of the KV cache that keep the recurrent state at places where other prompts may go on; only for "
            "models with recurrent layers, such as Qwen 3.5; default: up to half of what running sequences leave"
        ),
    )
    prefix_cache_dir: Annotated[Path | None, BeforeValidator(without_comment)] = Field(
        None,
        description=(
            "a directory that keeps the state of prompts and answers, so that they are not computed again after a "
            "restart; default: none"
        ),
    )
    prefix_cache_size: Bytes = Field(
        8 * 2**30, description="the bytes of PREFIX_CACHE_DIR; what was not used for the longest time goes first"
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

    lora_adapters: Annotated[dict[str, str], NoDecode, BeforeValidator(parse_pairs)] = Field(
        {}, description="LoRA adapters of the first model, each served as a model: name=directory,name=directory"
    )
    lora_dir: Path | None = Field(
        None,
        description=(
            "the directory below which POST /v1/load_lora_adapter may load adapters; "
            "default: it may only load those of LORA_ADAPTERS again"
        ),
    )
    max_lora_rank: int = Field(256, gt=0, description="the largest rank of an adapter's matrices")
    max_lora_adapters: int = Field(64, gt=0, description="the largest number of adapters that are loaded at a time")

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

    @field_validator("cache_dir", "models_dir", "prefix_cache_dir", "lora_dir")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Adds a source for the keys of the providers in PROVIDERS, which are not fields: .env and the environment."""
        variables: dict[str, str | None] = {}
        for source in (dotenv_settings, env_settings):  # the environment wins
            variables |= source.env_vars if isinstance(source, EnvSettingsSource) else {}
        keys = {
            name: SecretStr(key)
            for name, text in variables.items()
            if name.endswith("_api_key") and (key := without_comment(text))
        }
        added = InitSettingsSource(settings_cls, {"provider_keys": keys})
        return init_settings, env_settings, dotenv_settings, file_secret_settings, added

    @model_validator(mode="before")
    @classmethod
    def _add_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Puts the keys beside PROVIDERS, so that both are read together."""
        keys, text = values.get("provider_keys", {}), values.get("providers")
        return {**values, "providers": UnreadProviders(text, keys)} if isinstance(text, str) else values

    def provider_values(self) -> list[ProviderValues]:
        """Returns what is set for each provider: those of the table, then those of PROVIDERS."""
        table = [self._values(row, {each.kind: self._value(each) for each in row.settings}) for row in PROVIDERS]
        added = [self._values(provider.row, {"key": provider.key, "url": provider.url}) for provider in self.providers]
        return table + added

    def _value(self, setting: ProviderSetting) -> Any:
        """Returns the value of a provider's setting; an empty URL means the default one."""
        value = getattr(self, setting.name)
        return setting.default if value is None else value

    def _values(self, row: ProviderRow, values: dict[SettingKind, Any]) -> ProviderValues:
        timeout = values.get("timeout")
        return ProviderValues(
            row=row,
            url=values["url"].rstrip("/"),
            whole_url=values.get("whole_url"),
            key=values["key"],
            timeout=timeout or self.gateway_timeout,
            total_timeout=timeout or max(600.0, self.gateway_timeout),
            num_retries=self.gateway_max_retries,
            max_tokens=values.get("max_tokens", DEFAULT_MAX_TOKENS),
        )


def is_open_to_network(host: str) -> bool:
    """Returns whether other machines can reach a server that listens on `host`."""
    return host not in ("localhost", "::1") and not host.startswith("127.")


def from_command_line(arguments: list[str] | None = None) -> Settings:
    """Settings with command line flags on top (`--model-path PATH --host H --port P ...`); exits on bad ones."""
    return CliApp.run(Settings, cli_args=arguments)
