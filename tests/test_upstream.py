"""One provider over HTTP, with a transport in the network's place: when its circuit opens, and where its events end."""

import asyncio
import time

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


def test_the_circuit_opens_after_requests_that_found_no_connection_not_after_attempts() -> None:
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


def test_an_answer_with_an_error_is_no_success() -> None:
    statuses = iter([500, 200, 401])

    async def scenario() -> None:
        answers = httpx2.MockTransport(lambda request: httpx2.Response(next(statuses), stream=Parts([b"{}"])))
        theirs = Upstream(access(num_retries=0), answers)
        with pytest.raises(UpstreamError):
            await theirs.request("POST", URL, b"{}")
        assert theirs.last_success is None
        before = time.time()
        await theirs.request("POST", URL, b"{}")
        success = theirs.last_success
        assert success is not None and before <= success <= time.time()
        with pytest.raises(UpstreamError):
            await theirs.request("POST", URL, b"{}")
        assert theirs.last_success == success

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
