"""Which provider serves a model: a table of prefixes, and rules for bare names."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2

from config import Settings
from errors import APIError
from providers.anthropic import Claude
from providers.base import Gateway
from providers.openai_compatible import (
    Adapter,
    DeepSeekAdapter,
    GeminiAdapter,
    MiniMaxAdapter,
    OllamaAdapter,
    OpenAICompatible,
    Urls,
)
from providers.upstream import Upstream, UpstreamConfig

log = logging.getLogger(__name__)

LIST_TIMEOUT, LIST_AGE = 2.0, 600.0  # seconds: for a provider's list of models, and as long as it is good
BARE = (  # names without a prefix -> whose they are
    (re.compile(r"models/|gemini-"), "gemini"),
    (re.compile(r"text-embedding-|gpt-|o\d|chatgpt-"), "openai"),
)


@dataclass(frozen=True)
class ProviderConfig:
    """A provider that speaks OpenAI's protocol."""

    name: str
    key: str | None  # the setting with its key, which it needs
    urls: Callable[[Settings], Urls]
    adapter: Callable[[], Adapter] = Adapter


def _plain_urls(setting: str) -> Callable[[Settings], Urls]:
    return lambda settings: Urls(settings.url(setting))


def _deepseek_urls(settings: Settings) -> Urls:
    base = settings.url("deepseek_api_url")
    chat = base if urlsplit(base).path.endswith("/chat/completions") else None
    return Urls(base.removesuffix("/chat/completions"), chat, settings.deepseek_api_endpoint_nonstream)


def _minmax_urls(settings: Settings) -> Urls:
    url = settings.url("minmax_api_url")
    return Urls(url) if urlsplit(url).path in ("", "/v1") else Urls(url.rpartition("/")[0], url)


def _ollama_urls(settings: Settings) -> Urls:
    base = settings.url("ollama_baseurl")
    return Urls(base if base.endswith("/v1") else f"{base}/v1")


# To add a provider: a row here, its key in config.py and .env.example
PROVIDERS = (
    ProviderConfig("openai", "openai_api_key", _plain_urls("openai_base_url")),
    ProviderConfig("gemini", "google_api_key", _plain_urls("gemini_base_url"), GeminiAdapter),
    ProviderConfig("deepseek", "deepseek_api_key", _deepseek_urls, DeepSeekAdapter),
    ProviderConfig("minmax", "minmax_api_key", _minmax_urls, MiniMaxAdapter),
    ProviderConfig("ollama", None, _ollama_urls, OllamaAdapter),
)
SYNONYMS = {"minimax": "minmax"}


def _upstream_config(settings: Settings, name: str, key: str | None) -> UpstreamConfig:
    secret = getattr(settings, key or f"{name}_api_key")
    headers = {} if secret is None else {"authorization": f"Bearer {secret.get_secret_value()}"}
    is_ollama = name == "ollama"
    timeout = settings.ollama_timeout if is_ollama else settings.gateway_timeout
    total = settings.ollama_timeout if is_ollama else max(600.0, timeout)
    variable = (key or f"{name}_api_key").upper()
    return UpstreamConfig(name, variable, headers, key is not None, timeout, total, settings.gateway_max_retries)


def gateways_of(settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> dict[str, Gateway]:
    """By prefix, without its slash."""
    found: dict[str, Gateway] = {
        row.name: OpenAICompatible(
            Upstream(_upstream_config(settings, row.name, row.key), transport), row.urls(settings), row.adapter
        )
        for row in PROVIDERS
    }
    access = _upstream_config(settings, "claude", "anthropic_api_key")
    found["claude"] = Claude.of(settings, access, transport)
    return found | {synonym: found[name] for synonym, name in SYNONYMS.items()}


@dataclass
class CachedModelList:
    """The models of a provider, as it said last."""

    names: list[str] = field(default_factory=list)
    at: float = -LIST_AGE


class Router:
    """Names of models -> who answers for them."""

    def __init__(self, settings: Settings, is_local: Callable[[str], bool]) -> None:
        """is_local: whether a name is exactly that of a model here."""
        self._is_local = is_local
        self._aliases, self._fallbacks = settings.model_aliases, settings.model_fallbacks
        self.gateways = gateways_of(settings)
        self._lists: dict[str, CachedModelList] = {}
        self._refreshing: asyncio.Future[list[None]] | None = None

    def alias(self, model: str) -> str:
        """What the operator wants a name to mean."""
        return self._aliases.get(model, model)

    def gateway(self, model: str) -> tuple[str, Gateway, str] | None:
        """The provider's name, the provider and the model's name there; None: the model is this server's matter."""
        if self._is_local(model):
            return None
        prefix, slash, name = model.partition("/")
        if slash and prefix in self.gateways:
            return prefix, self.gateways[prefix], name
        bare = next((owner for pattern, owner in BARE if pattern.match(model)), None)
        return None if bare is None else (bare, self.gateways[bare], model)

    def tries(self, model: str) -> list[str]:
        """The model, and who may answer where its provider cannot."""
        return [model, *self._fallbacks.get(model, ())]

    async def listed(self) -> list[tuple[str, str]]:
        """(provider, model) of all that can be used elsewhere. Only the first call waits, two seconds at most."""
        usable = {name: g for name, g in self.gateways.items() if g.upstream.access.is_usable and name not in SYNONYMS}
        stale = [name for name in usable if self._list(name).at + LIST_AGE < time.monotonic()]
        if stale:
            is_first = self._refreshing is None
            if self._refreshing is None or self._refreshing.done():
                work = asyncio.gather(*(self._refresh(name, usable[name]) for name in stale))
                self._refreshing = asyncio.ensure_future(work)
            if is_first:
                await asyncio.wait({self._refreshing})
        return [(name, model) for name in usable for model in self._list(name).names]

    def _list(self, name: str) -> CachedModelList:
        return self._lists.setdefault(name, CachedModelList())

    async def _refresh(self, name: str, gateway: Gateway) -> None:
        """What cannot be had now is asked for again in a minute."""
        listed = self._list(name)
        listed.at = time.monotonic() - LIST_AGE + 60
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                listed.names, listed.at = await gateway.models(), time.monotonic()
        except (APIError, TimeoutError):
            pass
        except Exception:
            log.exception("the models of %s cannot be listed", name)

    @property
    def health(self) -> dict[str, dict[str, object]]:
        """Of the providers that were asked something."""
        return {
            name: {"last_success": gateway.upstream.last_success, "resting": gateway.upstream.is_resting}
            for name, gateway in self.gateways.items()
            if gateway.upstream.was_asked and name not in SYNONYMS
        }

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        upstreams: Sequence[Upstream] = list({id(g.upstream): g.upstream for g in self.gateways.values()}.values())
        for upstream in upstreams:
            await upstream.close()
