"""Which provider serves a model: by the prefix of its name, or by a pattern for names without one."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx2

from config import ProviderValues, Settings
from errors import APIError
from provider_table import PROVIDERS, ProtocolName
from providers.anthropic import Claude
from providers.base import Provider
from providers.openai_compatible import OpenAICompatible

log = logging.getLogger(__name__)

PROTOCOLS: Mapping[ProtocolName, Callable[[ProviderValues, httpx2.AsyncBaseTransport | None], Provider]] = {
    "openai": OpenAICompatible.of,
    "anthropic": Claude.of,
}
LIST_TIMEOUT = 2.0  # seconds that a provider's list of models may take
LIST_AGE, LIST_RETRY = 600.0, 60.0  # seconds before a list is asked for again: one that came, one that did not
BARE_NAMES = tuple((re.compile(row.bare_names), row.name) for row in PROVIDERS if row.bare_names)


def providers_of(settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> dict[str, Provider]:
    """Returns the providers by their prefixes, without the slash; one with a synonym is there twice."""
    providers: dict[str, Provider] = {}
    for values in settings.provider_values():
        provider = PROTOCOLS[values.row.protocol](values, transport)
        providers |= dict.fromkeys(values.row.prefixes, provider)
    return providers


@dataclass
class CachedModelList:
    """A provider's models when they were last listed."""

    names: list[str] = field(default_factory=list)
    at: float = -LIST_AGE  # by time.monotonic()


class ProviderRouter:
    """Decides by a model's name which provider serves it."""

    def __init__(self, settings: Settings, is_local: Callable[[str], bool]) -> None:
        """is_local: whether a name is exactly that of a model of this server."""
        self._is_local = is_local
        self._aliases, self._fallbacks = settings.model_aliases, settings.model_fallbacks
        self._by_prefix = providers_of(settings)
        self._by_name = {provider.upstream.config.name: provider for provider in self._by_prefix.values()}
        self._lists: dict[str, CachedModelList] = {}
        self._refreshing: asyncio.Future[list[None]] | None = None

    def alias(self, model: str) -> str:
        """Returns the model that MODEL_ALIASES gives for a name, or the name itself."""
        return self._aliases.get(model, model)

    def provider_of(self, model: str) -> tuple[str, Provider, str] | None:
        """Returns the provider's prefix, the provider and the model's name there; None if this server must answer."""
        if self._is_local(model):
            return None
        prefix, slash, name = model.partition("/")
        if slash and prefix in self._by_prefix:
            return prefix, self._by_prefix[prefix], name
        provider = next((provider for pattern, provider in BARE_NAMES if pattern.match(model)), None)
        return None if provider is None else (provider, self._by_prefix[provider], model)

    def candidates(self, model: str) -> list[str]:
        """Returns the model, then those that MODEL_FALLBACKS gives for a failure of its provider."""
        return [model, *self._fallbacks.get(model, ())]

    async def listed(self) -> list[tuple[str, str]]:
        """Returns (provider, model) of all models at the providers; only the first call waits, LIST_TIMEOUT at most."""
        usable = {name: provider for name, provider in self._by_name.items() if provider.upstream.config.is_usable}
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

    async def _refresh(self, name: str, provider: Provider) -> None:
        """Asks a provider for its models; a list that does not come is asked for again after LIST_RETRY seconds."""
        listed = self._list(name)
        listed.at = time.monotonic() - LIST_AGE + LIST_RETRY
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                listed.names, listed.at = await provider.models(), time.monotonic()
        except (APIError, TimeoutError):
            pass
        except Exception:
            log.exception("the models of %s cannot be listed", name)

    @property
    def health(self) -> dict[str, dict[str, object]]:
        """The state of each provider that was sent a request."""
        return {
            name: {"last_success": provider.upstream.last_success, "circuit_open": provider.upstream.is_circuit_open}
            for name, provider in self._by_name.items()
            if provider.upstream.was_asked
        }

    async def close(self) -> None:
        """Closes the connections to all providers."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for provider in self._by_name.values():
            await provider.upstream.close()
