"""Setting values: texts of the command line and the environment become what settings hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from provider_table import PROVIDERS, RESERVED, ProviderRow, key_variable

_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(value: Any) -> Any:
    """Converts a size such as `4GiB`, `512m` or `1000000` to bytes. Raises ValueError for any other text."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().removesuffix("b").removesuffix("i")
    unit = _UNITS.get(text[-1:], 1)
    try:
        return int(float(text.rstrip("kmgt")) * unit)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a size: write one such as 4GiB, 512MiB or 1000000") from None


def without_comment(value: Any) -> Any:
    """Removes a comment, which some readers of .env files leave in the value; returns None if nothing is left."""
    if not isinstance(value, str):
        return value
    text = re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()
    return text or None


def parse_pairs(value: Any) -> Any:
    """Parses `a=b,c=d` to {"a": "b", "c": "d"}. Raises ValueError for any other form."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in (without_comment(value) or "").split(",") if pair.strip()]
    if not all(equals and name.strip() and other.strip() for name, equals, other in pairs):
        raise ValueError(f"{value!r} is not a list such as name=other,name=other")
    return {name.strip(): other.strip() for name, _, other in pairs}


def parse_fallbacks(value: Any) -> Any:
    """Parses `a=b,c;d=e` to {"a": ["b", "c"], "d": ["e"]}. Raises ValueError for any other form."""
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
    """Parses `alice:sk-1;rpm=60;concurrent=4,sk-2` to ApiKeys; one without a name is called by its number."""
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
        name=name if colon else default,
        secret=SecretStr(secret if colon else name),
        requests_per_minute=rate if "rpm" in given else None,
        concurrent=concurrent if "concurrent" in given else None,
    )


@dataclass(frozen=True)
class AddedProvider:
    """A provider that PROVIDERS names."""

    name: str
    url: str
    key: SecretStr | None = None

    @property
    def row(self) -> ProviderRow:
        return ProviderRow(name=self.name, default_url=self.url, needs_key=False)


@dataclass(frozen=True)
class UnreadProviders:
    """The text of PROVIDERS, and the keys in the environment by the names of their variables, in lower case."""

    text: str
    keys: Mapping[str, SecretStr]


def parse_providers(value: Any) -> Any:
    """Parses `groq=https://api.groq.com/openai/v1,other=URL` to AddedProviders with their keys."""
    if not isinstance(value, UnreadProviders):
        return value
    rows = [row.strip() for row in (without_comment(value.text) or "").split(",") if row.strip()]
    providers = [_added_provider(row, value.keys) for row in rows]
    names = [provider.name for provider in providers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"it has the provider {twice[0]} twice: remove or rename one of them")
    return tuple(providers)


def _added_provider(row: str, keys: Mapping[str, SecretStr]) -> AddedProvider:
    name, equals, url = (part.strip() for part in row.partition("="))
    if not equals:
        raise ValueError(f"{row!r} has no URL: write name=https://host/v1,name=https://host/v1")
    if not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise ValueError(f"{name!r} cannot be the name of a provider: use letters, digits and dashes")
    if name in {*RESERVED, *(prefix for row in PROVIDERS for prefix in row.prefixes)}:
        raise ValueError(f"the name {name} is taken: give the provider another one")
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"{url!r}, the URL of {name}, is not valid: write one such as https://host/v1")
    key = keys.get(key_variable(name).lower())
    return AddedProvider(name, url, key)
