"""/v1/messages as a view of chat completions: its request becomes one, and the chunks become its events.

This module knows no provider. Source: https://platform.claude.com/docs/en/build-with-claude/streaming.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from api.messages.input import named
from api.messages.output import Blocks
from api.messages.schemas import (
    MessageAnswer,
    MessageDelta,
    MessageEnd,
    MessagesEvent,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    StopReason,
)
from errors import APIError
from schemas import ChatCompletionChunk, Usage
from server.error_formats import ANTHROPIC
from server.events import SILENCE, StreamFormat, encode_event, marking_silence
from server.headers import header_value

REASONS: Mapping[str, StopReason] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
# Betas whose meaning this server has anyway; each name ends in a date. Others have no effect
KNOWN_BETAS = (
    *("interleaved-thinking", "fine-grained-tool-streaming", "structured-outputs", "effort", "adaptive-thinking"),
    *("prompt-caching", "extended-cache-ttl", "token-counting", "tools", "messages", "claude-code"),
)
BEGIN_AFTER = SILENCE / 2
PING = encode_event(Ping().model_dump_json(), "ping")


async def stream(
    request: MessagesRequest, chunks: AsyncGenerator[ChatCompletionChunk], silence: float = BEGIN_AFTER
) -> AsyncGenerator[MessagesEvent]:
    """Makes the events of the first choice. Raises what the chunks raise, with the client's names of fields.

    After `silence` seconds without a chunk the answer begins without its usage, so that no ping comes before it.
    """
    omits_thoughts = request.thinking is not None and request.thinking.display == "omitted"
    answer, blocks = MessageAnswer(model=request.model), Blocks(omits_thoughts)
    has_begun = False
    try:
        async with aclosing(marking_silence(chunks, silence)) as items:
            async for chunk in items:
                if not has_begun:
                    has_begun = True
                    if chunk is not None:
                        answer.model, answer.usage = chunk.model, usage_of(chunk.known_usage)
                    yield MessageStart(message=_begun(answer))
                    yield Ping()
                if chunk is None:
                    continue
                if chunk.usage is not None:
                    answer.usage = usage_of(chunk.usage)
                for choice in chunk.choices:
                    for event in blocks.add(choice):
                        yield event
                    if choice.finish_reason is not None:
                        end = _end(choice.finish_reason, choice.stop_reason)
                        answer.stop_reason, answer.stop_sequence = end.stop_reason, end.stop_sequence
    except APIError as error:
        raise named(error, request) from None
    for event in blocks.end():
        yield event
    answer.content, answer.stop_reason = blocks.finished, answer.stop_reason or "end_turn"
    end = MessageEnd(stop_reason=answer.stop_reason, stop_sequence=answer.stop_sequence)
    yield MessageDelta(delta=end, usage=answer.usage)
    yield MessageStop(answer=answer)


def _begun(answer: MessageAnswer) -> MessageAnswer:
    """Returns an answer as it is before any of it has come."""
    return answer.model_copy(update={"usage": answer.usage.model_copy(update={"output_tokens": 0})})


def _end(reason: str, stop_string: str | None) -> MessageEnd:
    if stop_string is not None:
        return MessageEnd(stop_reason="stop_sequence", stop_sequence=stop_string)
    return MessageEnd(stop_reason=REASONS[reason])


def usage_of(usage: Usage | None) -> MessageUsage:
    """Returns the counts in Anthropic's form, in which tokens of the prompt that were cached are counted apart."""
    if usage is None:
        return MessageUsage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )


async def collect(events: AsyncIterator[MessagesEvent]) -> MessageAnswer:
    """Returns the answer of the last event of a stream, which holds everything."""
    last: MessagesEvent | None = None
    async for event in events:
        last = event
    assert isinstance(last, MessageStop)
    return last.answer


class MessagesEncoder:
    """Writes the named events of Messages; silence is broken by pings."""

    format = StreamFormat(keep_alive=PING)

    def event(self, item: MessagesEvent) -> bytes:
        return encode_event(item.model_dump_json(), item.type)

    def failure(self, error: APIError) -> bytes:
        return ANTHROPIC.event(error)

    def end(self) -> bytes:
        return b""


def ignored_betas_header(betas: str) -> dict[str, str]:
    """Returns the header that names those of the betas in `anthropic-beta` that this server does not know."""
    names = [name.strip() for name in betas.split(",") if name.strip()]
    unknown = [name for name in names if not name.startswith(KNOWN_BETAS)]
    return {"X-Ignored-Betas": header_value(*unknown)} if unknown else {}
