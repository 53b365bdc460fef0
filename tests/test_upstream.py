"""One provider over HTTP, with a transport in the network's place: when it rests, and where its events end."""

import asyncio

import httpx2
import pytest
from upstreams import Parts

from errors import UpstreamError
from providers.upstream import NUM_FAILURES, Upstream, UpstreamConfig, events_of

URL = "http://provider.example/v1/chat/completions"


def access(num_retries: int) -> UpstreamConfig:
    return UpstreamConfig(
        name="theirs",
        key_variable="THEIR_API_KEY",
        headers={},
        needs_key=False,
        timeout=5,
        total_timeout=5,
        num_retries=num_retries,
    )


def test_a_provider_rests_after_requests_that_found_no_connection_not_after_attempts() -> None:
    attempts = 0

    def refuse(request: httpx2.Request) -> httpx2.Response:
        nonlocal attempts
        attempts += 1
        raise httpx2.ConnectError("refused")

    async def scenario() -> None:
        theirs = Upstream(access(num_retries=1), httpx2.MockTransport(refuse))
        for number in range(NUM_FAILURES):
            assert not theirs.is_circuit_open, number
            with pytest.raises(UpstreamError):
                await theirs.stream(URL, b"{}")
        assert theirs.is_circuit_open and attempts == 2 * NUM_FAILURES
        with pytest.raises(UpstreamError) as refusal:
            await theirs.stream(URL, b"{}")
        assert refusal.value.status == 503 and refusal.value.retry_after and attempts == 2 * NUM_FAILURES

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_events_end_where_they_end_however_they_come(end: bytes) -> None:
    told = [b'data: {"a": "\\n\\n"}' + end, b": comment" + end, b"event: x\ndata: 1" + end, b"data: [DONE]" + end]
    text = b"".join(told)

    async def read(parts: list[bytes]) -> list[bytes]:
        response = httpx2.Response(200, stream=Parts(parts))
        return [event async for event in events_of(response, Upstream(access(0)))]

    async def scenario() -> None:
        for cut in range(len(text)):
            assert await read([text[:cut], text[cut:]]) == told, cut
        assert await read([text[place : place + 1] for place in range(len(text))]) == told

    asyncio.run(scenario())
