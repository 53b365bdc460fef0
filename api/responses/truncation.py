"""`truncation: auto`: the oldest messages are dropped until the prompt leaves room for an answer."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from errors import ContextLengthExceeded
from schemas import ChatCompletionRequest, Message

SYSTEM = ("system", "developer")
RESERVE = 4  # an answer of unknown length gets at least this part of the context, as one over it


@dataclass(frozen=True)
class PromptSize:
    """The length of a prompt, and of the model's context, in tokens."""

    num_tokens: int
    context: int

    def has_room(self, max_tokens: int | None) -> bool:
        """Returns whether an answer fits: of `max_tokens`, but of a quarter of the context at most."""
        reserve = self.context // RESERVE
        return self.num_tokens + min(max_tokens or reserve, reserve) <= self.context


Measure = Callable[[ChatCompletionRequest], Awaitable[PromptSize]]


async def truncated(chat: ChatCompletionRequest, measure: Measure) -> ChatCompletionRequest:
    """Returns the request without its oldest messages, as few as possible. `measure` renders and counts a prompt.

    The system's messages, the user's last one and what is last stay; a call goes together with its results. If all else
    is too long, the request stays so, and is refused where any other is.
    """
    droppable = _droppable(chat.messages)
    fewest, most = 0, len(droppable)  # of the groups to drop; bisection, since each try renders the whole prompt
    while fewest < most:
        middle = (fewest + most) // 2 if fewest else 0
        if await _fits(_without(chat, droppable[:middle]), measure):
            most = middle
        else:
            fewest = middle + 1
    return _without(chat, droppable[:fewest])


async def _fits(chat: ChatCompletionRequest, measure: Measure) -> bool:
    try:
        return (await measure(chat)).has_room(chat.max_tokens)
    except ContextLengthExceeded:
        return False


def _droppable(messages: list[Message]) -> list[list[int]]:
    """Returns the numbers of the messages that may go, in groups that go together, the oldest first."""
    last_user = max((number for number, message in enumerate(messages) if message.role == "user"), default=None)
    groups: list[list[int]] = []
    for number, message in enumerate(messages):
        if message.role in SYSTEM:
            continue
        if message.role == "tool" and groups and messages[groups[-1][0]].role == "assistant":
            groups[-1].append(number)
        else:
            groups.append([number])
    return [group for group in groups[:-1] if last_user not in group]


def _without(chat: ChatCompletionRequest, groups: list[list[int]]) -> ChatCompletionRequest:
    gone = {number for group in groups for number in group}
    kept = [message for number, message in enumerate(chat.messages) if number not in gone]
    return chat.model_copy(update={"messages": kept}) if gone else chat
