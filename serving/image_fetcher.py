"""ImageFetcher: returns the bytes of an image by its URL. It connects to public addresses only, unless the setting
ALLOW_PRIVATE_IMAGE_URLS is true.

Every hop of a redirect is checked, the name is resolved once, and the connection goes to the address that was checked
(https://owasp.org/www-community/attacks/Server_Side_Request_Forgery).
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import unquote_to_bytes

import httpx2

from errors import InvalidRequest
from serving.image_decoder import MAX_BYTES, too_large

TIMEOUT = 10.0  # seconds for one image, with redirects
MAX_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the IPv4 address is in its last 32 bits
NEVER_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b:1::/48",  # local-use NAT64: only that network knows which IPv4 address is meant
            "2001::/32",  # Teredo
            "168.63.129.16/32",  # Azure's host, reachable from its virtual machines
        ),
    )
)
MAX_ESCAPED = 2**20  # characters of a data: URL with % escapes, which need a hundred times their length in memory
Resolve = Callable[[str, int], Awaitable[list[str]]]  # host, port -> addresses

_resolvers = ThreadPoolExecutor(8, "resolver")  # separate threads, because a DNS lookup cannot be cancelled


async def resolve(host: str, port: int) -> list[str]:
    """Returns the addresses of a host name; raises OSError."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    entries = await asyncio.get_running_loop().run_in_executor(_resolvers, look_up)
    return [str(entry[4][0]) for entry in entries]


class ImageFetcher:
    """Fetches images by data:, http: and https: URLs, within bounds of size and time."""

    def __init__(
        self,
        allows_private: bool = False,
        hosts: Collection[str] | None = None,
        resolve: Resolve = resolve,
        timeout: float = TIMEOUT,
    ) -> None:
        """allows_private: whether private addresses are allowed; hosts: the only ones allowed, None for all;
        timeout: in seconds."""
        self._allows_private, self._resolve, self._timeout = allows_private, resolve, timeout
        self._hosts = None if hosts is None else {host.casefold() for host in hosts}
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str, param: str) -> bytes:
        """Returns the image's bytes. Raises InvalidRequest, whose text reveals nothing of the internal network."""
        scheme = url.partition(":")[0].casefold()
        if scheme == "data":
            return await asyncio.to_thread(_decode_data_url, url, param)
        if scheme not in ("http", "https"):
            raise _refused("The image's URL must be a data:, http: or https: URL.", param)
        try:
            # A client for each image: hosts at the same address share neither cookies nor connections
            client = httpx2.AsyncClient(trust_env=False, verify=self._tls, timeout=self._timeout)
            async with asyncio.timeout(self._timeout), client:
                return await self._follow(client, url, param)
        except TimeoutError as error:
            raise _failed(f"The image did not arrive within {self._timeout:g} seconds.", param) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError, ValueError) as error:
            raise _failed("The image could not be fetched.", param) from error

    async def _follow(self, client: httpx2.AsyncClient, url: str, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            client.cookies.clear()
            body_or_url = await self._get(client, url, param)
            if isinstance(body_or_url, bytes):
                return body_or_url
            url = body_or_url
        raise _failed(f"The image's URL redirects more than {MAX_REDIRECTS} times.", param)

    async def _get(self, client: httpx2.AsyncClient, url: str, param: str) -> bytes | str:
        """Returns the body, or the URL of a redirect."""
        parsed = httpx2.URL(url)
        address = await self._check(parsed, url, param)
        pinned = parsed.copy_with(host=address)
        host = parsed.netloc.decode("ascii")
        headers = {"Host": host, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        extensions = {"sni_hostname": parsed.raw_host.decode("ascii")} if parsed.scheme == "https" else {}
        request = client.build_request("GET", pinned, headers=headers, extensions=extensions)
        response = await client.send(request, stream=True)
        try:
            if response.status_code in REDIRECTS and "location" in response.headers:
                return str(parsed.join(response.headers["location"]))
            return await _body(response, param)
        finally:
            await response.aclose()

    async def _check(self, parsed: httpx2.URL, url: str, param: str) -> str:
        """Returns the address to connect to; raises InvalidRequest for a URL that is not allowed."""
        is_odd = any(ord(character) <= 32 or character == "\\" for character in url) or parsed.userinfo
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        if parsed.scheme not in ("http", "https") or not parsed.host or port > 65535 or is_odd:
            raise _refused("The image's URL must be a plain http: or https: URL.", param)
        names = {parsed.host.casefold(), parsed.raw_host.decode("ascii").casefold()}
        if self._hosts is not None and not names & self._hosts:
            raise _refused("Images from this host are not allowed: send the image as a data: URL.", param)
        addresses = await self._resolve(parsed.raw_host.decode("ascii").strip("[]"), port)
        if not addresses or not (self._allows_private or all(is_public(address) for address in addresses)):
            raise _refused("The image's URL does not lead to a public address: send the image as a data: URL.", param)
        return addresses[0]


def is_public(text: str) -> bool:
    """Returns whether an address is public, and so is an IPv4 address that it embeds."""
    address = ipaddress.ip_address(text)
    if any(address in network for network in NEVER_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if address.scope_id or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


async def _body(response: httpx2.Response, param: str) -> bytes:
    if response.status_code != 200:
        raise _failed(f"The image could not be fetched: HTTP {response.status_code}.", param)
    kind = response.headers.get("content-type", "image/").partition(";")[0].strip().casefold()
    is_plain = response.headers.get("content-encoding", "identity").casefold() == "identity"
    if not (kind.startswith("image/") or kind in ("application/octet-stream", "binary/octet-stream")) or not is_plain:
        raise _failed("The URL did not return an image: send the image as a data: URL.", param)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BYTES:
            raise too_large(param)
    return bytes(body)


def _decode_data_url(url: str, param: str) -> bytes:
    """Decodes a URL of https://www.rfc-editor.org/rfc/rfc2397; white space and URL-safe base64 are accepted too."""
    head, comma, data = url.partition(",")
    if not comma:
        raise _refused("A data: URL must have a comma before its data.", param)
    if len(data) > 2 * MAX_BYTES:
        raise too_large(param)
    if "%" in data and len(data) > MAX_ESCAPED:
        limit = f"A data: URL with % escapes must have at most {MAX_ESCAPED} characters"
        raise _refused(f"{limit}: send base64 without escapes.", param)
    try:
        raw = unquote_to_bytes(data) if "%" in data else data.encode("ascii")
        if not head.casefold().endswith(";base64"):
            return raw
        raw = raw.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused("The data: URL does not hold valid base64.", param) from error


def _refused(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_image_url")


def _failed(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="image_fetch_failed")
