"""How a connection ends whose client does not read, reads slowly, or is still sending."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from server.transport import Transport

TIMEOUT = 0.2  # seconds


class Connected(asyncio.Protocol):
    def __init__(self, is_awaited: bool) -> None:
        self.is_awaited = is_awaited
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        loop = asyncio.get_running_loop()
        self.transport = Transport(transport, loop, TIMEOUT, lambda: self.is_awaited)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport.abort()
        self.lost.set()


def with_client(scenario: Callable[[Connected, socket.socket], Coroutine[Any, Any, None]], is_awaited: bool) -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        there.setblocking(False)
        with there:
            subject = Connected(is_awaited)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: subject, here)
            async with asyncio.timeout(30):
                await scenario(subject, there)

    asyncio.run(main())


def fill(transport: Transport) -> None:
    """Writes until the system takes no more. What is left is so little that nobody waits for it."""
    while not transport.get_write_buffer_size():
        transport.write(b"x" * 1000)
    assert transport.get_write_buffer_size() <= 1000


@pytest.mark.parametrize("is_awaited", [False, True])
@pytest.mark.parametrize("closes", [False, True])
def test_who_reads_nothing_is_given_up(closes: bool, is_awaited: bool) -> None:
    async def scenario(subject: Connected, client: socket.socket) -> None:
        fill(subject.transport)
        if closes:
            subject.transport.close()
        await subject.lost.wait()

    with_client(scenario, is_awaited)


@pytest.mark.parametrize("closes", [False, True])
def test_who_reads_slowly_gets_all_of_it(closes: bool) -> None:
    async def scenario(subject: Connected, client: socket.socket) -> None:
        size = 1_000_000  # more than the system takes
        subject.transport.write(b"x" * size)
        if closes:
            subject.transport.close()
        loop, got, begin = asyncio.get_running_loop(), 0, asyncio.get_running_loop().time()
        while got < size:
            got += len(await loop.sock_recv(client, 40_000))
            await asyncio.sleep(3 * TIMEOUT * 40_000 / size)
        assert loop.time() - begin > 2 * TIMEOUT
        if closes:
            await subject.lost.wait()
        assert subject.lost.is_set() == closes
        subject.transport.abort()

    with_client(scenario, False)


def test_a_client_that_is_still_sending_can_read_why_it_is_refused() -> None:
    async def scenario(subject: Connected, client: socket.socket) -> None:
        client.send(b"the beginning")
        subject.transport.write(b"no")
        subject.transport.close()
        assert subject.transport.is_closing()
        subject.transport.write(b"nothing more")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(client, 100) == b"no" and await loop.sock_recv(client, 100) == b""
        client.send(b"the rest")
        assert not subject.lost.is_set(), "it is not reset"
        client.close()
        await subject.lost.wait()

    with_client(scenario, True)
