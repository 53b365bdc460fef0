"""The fetcher reaches public addresses alone, each hop checked, and ends whatever does not end."""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from errors import InvalidRequest
from serving.image_decoder import MAX_BYTES
from serving.image_fetcher import ImageFetcher, is_public, resolve

Serve = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
PICTURE = b"\x89PNG picture"


def answer(body: bytes = PICTURE, status: str = "200 OK", kind: str = "image/png", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[str, list[str]]]:
    """Its URL, and the requests that came."""
    requests: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            requests.append(request)
            await serve(request.split()[1], writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", requests
    finally:
        listening.close()


def plain(pages: dict[str, bytes]) -> Serve:
    async def serve(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(pages[path])

    return serve


async def fetch(url: str, **options: Any) -> bytes:
    fetcher = ImageFetcher(**{"allows_private": True, **options})
    return await fetcher.fetch(url, "messages[0].content[0]")


def refusal(work: Awaitable[Any]) -> InvalidRequest:
    async def run() -> InvalidRequest:
        with pytest.raises(InvalidRequest) as refused:
            await work
        return refused.value

    error = asyncio.run(run())
    assert error.status == 400 and error.param == "messages[0].content[0]" and "127.0.0.1" not in error.message
    return error


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(PICTURE).decode(),
        "data:;base64," + base64.b64encode(PICTURE).decode().rstrip("="),
        "DATA:image/png;charset=x;BASE64," + base64.urlsafe_b64encode(PICTURE).decode(),
        "data:image/png;base64,\n " + base64.encodebytes(PICTURE).decode(),
        "data:image/png,%89PNG%20picture",
    ],
)
def test_data_urls_hold_their_bytes(url: str) -> None:
    assert asyncio.run(fetch(url)) == PICTURE


def test_data_urls_that_would_take_much_memory_are_refused() -> None:
    for data, limit in (("%41" * 10**6, "1048576 characters"), ("A" * (2 * MAX_BYTES + 1), "20 MiB")):
        error = refusal(fetch("data:image/png;base64," + data))
        assert limit in error.message
    assert len(asyncio.run(fetch("data:;base64," + "QUFB \n" * 10**5))) == 3 * 10**5


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,a%%b!", "data:image/png;base64,abcde"])
def test_broken_data_urls_are_refused(url: str) -> None:
    assert refusal(fetch(url)).code == "invalid_image_url"


def test_an_image_is_fetched_and_redirects_are_followed() -> None:
    async def run() -> None:
        pages = {"/a.png": answer(), "/r": answer(b"", "302 Found", Location="/a.png")}
        async with server(plain(pages)) as (url, requests):
            assert await fetch(f"{url}/a.png") == await fetch(f"{url}/r") == PICTURE
            assert len(requests) == 3 and "Authorization" not in requests[0]
            assert f"host: {url.removeprefix('http://')}" in requests[0].casefold()

    asyncio.run(run())


def test_neither_cookies_nor_connections_outlive_an_image() -> None:
    """At one address there may be many hosts."""

    async def run() -> None:
        pages = {
            "/a": answer(Set_Cookie="a=1; Path=/"),
            "/r": answer(b"", "302 Found", Location="/a", Set_Cookie="b=2"),
        }
        async with server(plain(pages)) as (url, requests):
            fetcher = ImageFetcher(allows_private=True)
            for path in ("/a", "/r", "/a"):
                await fetcher.fetch(url + path, "p")
            assert len(requests) == 4 and not any("cookie" in request.casefold() for request in requests)
            assert all("connection: close" in request.casefold() for request in requests)

    asyncio.run(run())


def test_every_request_has_a_connection_of_its_own() -> None:
    """Also to a server that would keep them, and within a redirect: at one address there may be many hosts."""

    async def run() -> None:
        connections, requests, ended = 0, 0, 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections, requests, ended
            connections += 1
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    path = (await reader.readuntil(b"\r\n\r\n")).decode().split()[1]
                    requests += 1
                    page = answer() if path == "/a" else answer(b"", "302 Found", Location="/a")
                    writer.write(page.replace(b"Connection: close\r\n", b""))
                    await writer.drain()
            writer.close()
            await writer.wait_closed()
            ended += 1

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        fetcher = ImageFetcher(allows_private=True)
        for path in ("/a", "/r", "/a"):
            assert await fetcher.fetch(url + path, "p") == PICTURE
        while ended < connections:
            await asyncio.sleep(0.01)
        listening.close()
        assert connections == requests == 4

    asyncio.run(run())


def test_names_are_resolved_while_all_other_threads_are_busy() -> None:
    """And the other way round: a name server's silence holds up nothing but images."""

    async def run() -> None:
        ended = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, ended.wait, 30)
        try:
            assert "127.0.0.1" in await asyncio.wait_for(resolve("127.0.0.1", 80), 5)
        finally:
            ended.set()
            await busy

    asyncio.run(run())


PRIVATE = [
    *("127.0.0.1", "127.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0"),
    *("224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "2130706433", "0x7f000001", "0177.0.0.1"),
    *("[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[fd12::1]", "[ff02::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("[64:ff9b:1:7f00:0:100:808:808]", "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "168.63.129.16"),
    *("[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[fec0::1]", "localhost", "LOCALHOST.", "\uff11\uff12\uff17.0.0.1"),
]


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_packet_goes_to_a_private_address(host: str, scheme: str) -> None:
    async def run() -> None:
        async with server(plain({})) as (url, requests):
            port = url.rpartition(":")[2]
            with pytest.raises(InvalidRequest) as refused:
                await fetch(f"{scheme}://{host}:{port}/x.png", allows_private=False)
            assert refused.value.code in ("invalid_image_url", "image_fetch_failed") and not requests

    asyncio.run(run())


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "gopher://127.0.0.1:1/", "ftp://example.com/a", "/dev/zero", "unix:/x", "a.png", ""),
        *("http://", "http:///x", "http://example.com\\@127.0.0.1/", "http://user:pass@example.com/x"),
        *("http://exa mple.com/", "http://example.com/\r\nX: y", "http://example.com/\tx", "http://[::1%25lo]/"),
        *("javascript:alert(1)", "http://example.com:99999/", "http://[:::1]/"),
    ],
)
def test_odd_urls_are_refused_without_asking_anybody(url: str) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    error = refusal(fetch(url, allows_private=False, resolve=resolve))
    assert error.code in ("invalid_image_url", "image_fetch_failed") and asked in ([], ["::1%lo"], ["::1%25lo"])


def test_a_redirect_to_a_private_address_ends_there() -> None:
    async def run() -> None:
        async with server(plain({"/secret": answer()})) as (inside, requests):
            pages = {"/r": answer(b"", "302 Found", Location=f"{inside}/secret")}
            async with server(plain(pages)) as (outside, _):
                port = int(outside.rpartition(":")[2])

                async def resolve(host: str, asked: int) -> list[str]:
                    return ["127.0.0.1"] if host == "public.test" else ["10.0.0.9"]

                fetcher = Lenient(resolve=resolve)
                with pytest.raises(InvalidRequest) as refused:
                    await fetcher.fetch(f"http://public.test:{port}/r", "p")
                assert refused.value.code == "invalid_image_url" and not requests

    class Lenient(ImageFetcher):
        """Takes `public.test` for public, though it is here."""

        async def _check(self, parsed: Any, url: str, param: str) -> str:
            return "127.0.0.1" if parsed.host == "public.test" else await super()._check(parsed, url, param)

    asyncio.run(run())


def test_a_name_that_changes_its_address_is_asked_once_and_never_reached() -> None:
    """DNS rebinding: the connection goes to the address that was checked."""

    async def run() -> None:
        asked: list[str] = []
        async with server(plain({"/": answer()})) as (url, requests):

            async def resolve(host: str, port: int) -> list[str]:
                asked.append(host)
                return ["203.0.113.1"] if len(asked) == 1 else ["127.0.0.1"]

            port = url.rpartition(":")[2]
            with pytest.raises(InvalidRequest):
                await fetch(f"http://rebinding.test:{port}/", allows_private=False, resolve=resolve, timeout=1.0)
            assert not requests and asked == ["rebinding.test"]

    asyncio.run(run())


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "10.0.0.1"]

    assert refusal(fetch("http://both.test/", allows_private=False, resolve=resolve)).code == "invalid_image_url"


def test_hosts_can_be_limited_to_some() -> None:
    async def run() -> None:
        async with server(plain({"/a": answer()})) as (url, _):
            assert await fetch(f"{url}/a", hosts=["127.0.0.1"]) == PICTURE
            with pytest.raises(InvalidRequest):
                await fetch(f"{url}/a", hosts=["images.example"])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (answer(b"no", "404 Not Found"), "image_fetch_failed"),
        (answer(b"<html>", kind="text/html"), "image_fetch_failed"),
        (answer(b"zip", Content_Encoding="gzip"), "image_fetch_failed"),
        (answer(b"", "302 Found", Location="/"), "image_fetch_failed"),
        (answer(b"", "302 Found", Location="file:///etc/passwd"), "invalid_image_url"),
        (b"nonsense\r\n\r\n", "image_fetch_failed"),
        (b"", "image_fetch_failed"),
    ],
)
def test_what_is_no_answer_with_an_image_is_an_error(page: bytes, code: str) -> None:
    async def run() -> None:
        async with server(plain({"/": page})) as (url, _):
            with pytest.raises(InvalidRequest) as refused:
                await fetch(f"{url}/")
            assert refused.value.code == code

    asyncio.run(run())


def test_an_endless_body_is_cut_at_the_limit() -> None:
    sent = 0

    async def serve(path: str, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while True:
            writer.write(b"\0" * 65536)
            await writer.drain()
            sent += 65536

    async def run() -> None:
        async with server(serve) as (url, _):
            with pytest.raises(InvalidRequest) as refused:
                await fetch(f"{url}/")
            assert "20 MiB" in refused.value.message and sent < 2 * MAX_BYTES

    asyncio.run(run())


@pytest.mark.parametrize("slow", ["headers", "body"])
def test_a_slow_server_is_given_up(slow: str) -> None:
    async def serve(path: str, writer: asyncio.StreamWriter) -> None:
        if slow == "body":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        for _ in range(50):
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.1)

    async def run() -> None:
        async with server(serve) as (url, _):
            start = asyncio.get_running_loop().time()
            with pytest.raises(InvalidRequest) as refused:
                await fetch(f"{url}/", timeout=0.5)
            assert "within 0.5 seconds" in refused.value.message
            assert asyncio.get_running_loop().time() - start < 2

    asyncio.run(run())
