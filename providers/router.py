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
from providers.base import Gateway
from providers.openai_compatible import OpenAICompatible

log = logging.getLogger(__name__)

PROTOCOLS: Mapping[ProtocolName, Callable[[ProviderValues, httpx2.AsyncBaseTransport | None], Gateway]] = {
    "openai": OpenAICompatible.of,
    "anthropic": Claude.of,
}
LIST_TIMEOUT, LIST_AGE = 2.0, 600.0  # seconds: for a provider's list of models, and as long as it is good
BARE_NAMES = tuple((re.compile(row.bare_names), row.name) for row in PROVIDERS if row.bare_names)


def gateways_of(settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> dict[str, Gateway]:
    """The providers by their prefixes, without the slash; one with a synonym is there twice."""
    gateways: dict[str, Gateway] = {}
    for values in settings.provider_values():
        gateway = PROTOCOLS[values.row.protocol](values, transport)
        gateways |= dict.fromkeys(values.row.prefixes, gateway)
    return gateways


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
        self._providers = {gateway.upstream.config.name: gateway for gateway in self.gateways.values()}
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
        bare = next((owner for pattern, owner in BARE_NAMES if pattern.match(model)), None)
        return None if bare is None else (bare, self.gateways[bare], model)

    def tries(self, model: str) -> list[str]:
        """The model, and who may answer where its provider cannot."""
        return [model, *self._fallbacks.get(model, ())]

    async def listed(self) -> list[tuple[str, str]]:
        """(provider, model) of all that can be used elsewhere. Only the first call waits, two seconds at most."""
        usable = {name: gateway for name, gateway in self._providers.items() if gateway.upstream.config.is_usable}
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
            for name, gateway in self._providers.items()
            if gateway.upstream.was_asked
        }

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for gateway in self._providers.values():
            await gateway.upstream.close()
