"""The table of providers: one row has a provider's names, its settings and how it is spoken to.

To add a provider that speaks OpenAI's protocol, add a row with its name and its URL: the settings NAME_API_KEY and
NAME_BASE_URL, the flags, the place in /v1/models and the routing follow. This file imports no other module of this
server, so that config.py can take its settings from here.
"""

from dataclasses import dataclass
from typing import Literal

AdapterName = Literal["none", "gemini", "deepseek", "minimax", "ollama"]
ProtocolName = Literal["openai", "anthropic"]
SettingKind = Literal["key", "url", "whole_url", "timeout", "max_tokens"]


DEFAULT_MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ProviderSetting:
    """A setting that a row brings with it."""

    kind: SettingKind  # what the provider does with its value
    name: str  # its environment variable, in lower case
    description: str
    default: str | float | int | None = None
    alias: str = ""  # another name of its variable


@dataclass(frozen=True, kw_only=True)
class ProviderRow:
    """A provider of models."""

    name: str  # the prefix of its models: name/model
    default_url: str
    synonym: str = ""  # another prefix
    bare_names: str = ""  # a pattern: models whose names begin like this need no prefix
    protocol: ProtocolName = "openai"
    adapter: AdapterName = "none"  # what is put right in its requests and answers
    needs_key: bool = True
    key_variable: str = ""  # default: NAME_API_KEY
    key_alias: str = ""
    key_note: str = ""  # the end of its description
    url_variable: str = ""  # default: NAME_BASE_URL
    url_note: str = ""
    more_settings: tuple[ProviderSetting, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        return (self.name, self.synonym) if self.synonym else (self.name,)

    @property
    def key(self) -> ProviderSetting:
        return ProviderSetting(
            kind="key",
            name=(self.key_variable or key_variable(self.name)).lower(),
            description=f"the API key for {self.name}/{self.key_note}",
            alias=self.key_alias.lower(),
        )

    @property
    def url(self) -> ProviderSetting:
        return ProviderSetting(
            kind="url",
            name=(self.url_variable or f"{_variable(self.name)}_BASE_URL").lower(),
            description=f"the base URL of {self.name}/{self.url_note}",
            default=self.default_url,
        )

    @property
    def settings(self) -> tuple[ProviderSetting, ...]:
        return self.key, self.url, *self.more_settings


def key_variable(name: str) -> str:
    """Returns the environment variable with a provider's key: `my-groq` -> `MY_GROQ_API_KEY`."""
    return f"{_variable(name)}_API_KEY"


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


PROVIDERS = (
    ProviderRow(
        name="openai",
        default_url="https://api.openai.com/v1",
        bare_names=r"text-embedding-|gpt-|o\d|chatgpt-",
        key_note=" and for bare gpt-* and text-embedding-*",
    ),
    ProviderRow(
        name="gemini",
        default_url="https://generativelanguage.googleapis.com/v1beta/openai",
        bare_names="models/|gemini-",
        adapter="gemini",
        key_variable="GOOGLE_API_KEY",
        key_note=" and models/",
        url_note=", which is Google's OpenAI-compatible one",
    ),
    ProviderRow(
        name="claude",
        default_url="https://api.anthropic.com",
        protocol="anthropic",
        key_variable="ANTHROPIC_API_KEY",
        url_variable="ANTHROPIC_BASE_URL",
        more_settings=(
            ProviderSetting(
                kind="max_tokens",
                name="anthropic_default_max_tokens",
                description="the max_tokens of a request to claude/ that has none",
                default=DEFAULT_MAX_TOKENS,
            ),
        ),
    ),
    ProviderRow(
        name="deepseek",
        default_url="https://api.deepseek.com",
        adapter="deepseek",
        url_variable="DEEPSEEK_API_URL",
        url_note=", for streams",
        more_settings=(
            ProviderSetting(
                kind="whole_url",
                name="deepseek_api_endpoint_nonstream",
                description=(
                    "the whole URL of deepseek/ for answers that are not streamed; default: the same as for streams"
                ),
            ),
        ),
    ),
    ProviderRow(
        name="minmax",
        default_url="https://api.minimax.io/v1",
        synonym="minimax",
        adapter="minimax",
        key_alias="MINIMAX_API_KEY",
        key_note=" and minimax/",
        url_variable="MINMAX_API_URL",
        url_note=" that ends in /v1, or its whole URL",
    ),
    ProviderRow(
        name="ollama",
        default_url="http://localhost:11434",
        adapter="ollama",
        needs_key=False,
        key_note=", if it needs one",
        url_variable="OLLAMA_BASEURL",
        more_settings=(
            ProviderSetting(
                kind="timeout",
                name="ollama_timeout",
                description=(
                    "the seconds for which ollama/ may send nothing, and which an answer that is not streamed may take"
                ),
                default=120.0,
            ),
        ),
    ),
)
RESERVED = ("huggingface", "models")  # prefixes that mean something else
