"""Sequence: a prompt and its answer so far. It knows its tokens and blocks, not the model."""

import enum
import itertools
import time
from array import array
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from engine.constraint import Matcher
from engine.sampling_params import SampledToken, SamplingParams, fresh_seed
from engine.vision import Image

MOST_BOUNDARIES = 16
FinishReason = Literal["stop", "length"]
_numbers = itertools.count()


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True)
class TokenOutput:
    """What a step added to a sequence: one token, or only a finish_reason, since no end-of-sequence token is shown."""

    token_id: int | None
    finish_reason: FinishReason | None = None
    sampled: SampledToken | None = None  # the token with the log-probabilities that were asked for
    num_cached_tokens: int = 0  # leading tokens of the prompt that were in the cache; set in the first output
    prompt: tuple[SampledToken, ...] = ()  # the prompt's scored tokens, from its second one on; likewise
    queue_time: float = 0.0  # seconds until it was admitted; likewise


@dataclass
class RecurrentState:
    """Where the state of a sequence's recurrent layers is, and what it holds."""

    slot: int  # a row of the state tensors
    num_tokens: int  # leading tokens that the state holds
    reserved: dict[int, int] = field(default_factory=dict)  # number of tokens -> row that gets the state after them
    answer_key: bytes | None = None  # of the latest snapshot of the answer


OutputCallback = Callable[[TokenOutput | Exception], None]


@dataclass(eq=False)
class Sequence:
    """One prompt and its answer, with what the scheduler, the cache and the sampler keep of it."""

    prompt_ids: list[int]
    params: SamplingParams
    on_output: OutputCallback  # called on the event loop's thread
    priority: int = 0  # the smallest is computed first
    images: tuple[Image, ...] = ()  # of the prompt, in their order
    client: str = ""  # who sent it; clients take turns
    turn: int = 0  # within a priority, the smallest is admitted first
    added: float = field(default_factory=time.perf_counter)  # when it was made
    queue_time: float | None = None  # seconds until it was first admitted
    num_deferrals: int = 0  # steps since it came, until its prompt is computed; counted for low priorities
    number: int = field(default_factory=lambda: next(_numbers))
    status: Status = Status.WAITING
    token_ids: list[int] = field(init=False)  # prompt and answer
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    block_tables: list[list[int]] = field(default_factory=list)  # per layer group; FREED where the window has passed
    state: RecurrentState | None = None  # while it runs, if the model has recurrent layers
    boundaries: set[int] = field(default_factory=set)  # numbers of tokens after which another prompt may differ
    num_cached_tokens: int = 0  # tokens of the prompt that it took over from another sequence
    num_cached_blocks: int = 0  # leading blocks that other sequences can find
    is_looked_up: bool = False  # whether the prefix cache on disk was asked for its beginning
    num_reads: int = 0  # from there
    seed: int = field(init=False)
    prompt_logprobs: list[SampledToken] = field(default_factory=list)  # those scored so far, if they were asked for
    matcher: Matcher | None = field(init=False)  # its place in its grammar

    _block_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.matcher = None if self.params.grammar is None else self.params.grammar.matcher()
        self.seed = fresh_seed() if self.params.seed is None else self.params.seed

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    def block_keys(self, block_size: int) -> list[bytes]:
        """Returns a hash for each full block, over its tokens and images, all that come before them, and the adapter:
        the same tokens have other keys and values with other weights."""
        first = b"" if self.params.adapter is None else self.params.adapter.digest
        for end in range((len(self._block_keys) + 1) * block_size, len(self.token_ids) + 1, block_size):
            before = self._block_keys[-1] if self._block_keys else first
            tokens = array("I", self.token_ids[end - block_size : end]).tobytes()
            images = b"".join(
                image.digest + (image.start - end).to_bytes(8, "big", signed=True)
                for image in self.images_in(end - block_size, end)
            )
            self._block_keys.append(blake2b(before + tokens + images, digest_size=16).digest())
        return self._block_keys

    def images_in(self, start: int, end: int) -> tuple[Image, ...]:
        """Returns the images that have a token among start .. end."""
        return tuple(image for image in self.images if image.start < end and image.end > start)

    def whole_images_in(self, start: int, end: int) -> tuple[Image, ...]:
        """Returns the images of that range that no step may cut, since their tokens see each other."""
        return tuple(image for image in self.images_in(start, end) if not image.is_causal)

    def whole_chunk(self, end: int) -> int:
        """Returns where a chunk of the prompt that may reach `end` is to be cut, so that it neither splits an image
        nor includes one that is not encoded yet."""
        for image in self.images_in(self.num_computed, end):
            if image.features is None:
                return image.start
            if image.end > end and not image.is_causal:
                return image.start if image.start > self.num_computed else image.end
        return end

    def add_boundary(self, num_tokens: int) -> None:
        """Notes that another prompt may differ after that many tokens; not of more than MOST_BOUNDARIES such places."""
        if len(self.boundaries) < MOST_BOUNDARIES:
            self.boundaries.add(num_tokens)

    def continued(self, draft: tuple[int, ...]) -> "Sequence":
        """Returns a copy with these tokens appended, for the sampler."""
        other = copy(self)
        other.token_ids = [*self.token_ids, *draft]
        return other

    @property
    def is_stopped(self) -> bool:
        """Whether its last token is one of the request's stop tokens, outside the model's reasoning."""
        reasoning = self.params.reasoning
        is_stop = self.token_ids[-1] in self.params.stop_token_ids
        return is_stop and (reasoning is None or not reasoning.are_open(self.output_ids))

    @property
    def scores_prompt(self) -> bool:
        return self.params.num_prompt_logprobs is not None

    @property
    def next_scores(self) -> range:
        """Positions of the prompt that are not scored yet: each one's logits rate the token after it."""
        if not self.scores_prompt:
            return range(0)
        return range(len(self.prompt_logprobs), len(self.prompt_ids) - 1)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]
