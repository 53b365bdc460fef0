"""PrefillBudget: how many tokens of prompts a step may compute beside decodes, learnt from the time of past steps."""

from dataclasses import dataclass

STRETCH = 1.3  # a mixed step may take this many times a decode-only step; more if many prompts wait
FIRST_TOKENS = 16  # of prompts in the first step that also decodes, from which is learnt what a token adds
FEWEST_TOKENS = 8  # of prompts in a step, however slow it is, so that prompts make progress
MIXED_STEPS = 32  # in a row, after which a decode-only step is measured again
TIME_DECAY = 0.7  # the weight of earlier measurements beside a new one


@dataclass(frozen=True)
class DecodeTime:
    """Decode-only steps of a similar size, on average."""

    num_decodes: float
    seconds: float


class PrefillBudget:
    """Measures steps, and says how many tokens of prompts the next one may have.

    A mixed step is compared with a decode-only step of its size. Where there was none, as when a crowd arrives, or none
    for long, the next step gets no prompts, and is measured.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # tokens of prompts in a step
        self._decode_times: dict[int, DecodeTime] = {}  # number of decodes, rounded -> what they take
        self._token_time: float | None = None  # seconds that a token of a prompt adds to a step
        self._num_mixed: int | None = None  # mixed steps since a decode-only one; None: no step was measured yet

    def budget(self, num_decodes: int, num_prompts: int) -> int:
        """Returns the tokens of prompts in the next step. It grows with the number of waiting prompts per decode."""
        if self._num_mixed is None or self._token_time == 0:
            return self.limit
        if _size(num_decodes) not in self._decode_times or self._num_mixed >= MIXED_STEPS:
            return 0
        if self._token_time is None:
            return min(FIRST_TOKENS, self.limit)
        decode_time = self.decode_time(num_decodes) or 0.0
        allowed = (STRETCH * (1 + num_prompts / num_decodes) - 1) * decode_time
        return max(min(FEWEST_TOKENS, self.limit), min(self.limit, int(allowed / self._token_time)))

    def note(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        self._num_mixed = self._num_mixed or 0
        if num_decodes and num_prompt_tokens:
            self._num_mixed += 1
            self._note_mixed(num_decodes, num_prompt_tokens, seconds)
        elif num_decodes:
            self._num_mixed = 0
            before = self._decode_times.get(_size(num_decodes), DecodeTime(num_decodes, seconds))
            self._decode_times[_size(num_decodes)] = DecodeTime(
                moving_average(before.num_decodes, num_decodes), moving_average(before.seconds, seconds)
            )

    def _note_mixed(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        decode_time = self.decode_time(num_decodes)
        if decode_time is not None:
            added = max(0.0, seconds - decode_time) / num_prompt_tokens
            self._token_time = moving_average(self._token_time, added)

    def decode_time(self, num_decodes: int) -> float | None:
        """Seconds of a decode-only step, from those of its size, or else of the nearest smaller or larger one; None:
        unknown. Another decode is taken to add what a token of a prompt adds."""
        size = _size(num_decodes)
        sizes = sorted(self._decode_times, key=lambda other: (other > size, abs(other - size)))
        if not sizes:
            return None
        known = self._decode_times[sizes[0]]
        return known.seconds + max(0.0, num_decodes - known.num_decodes) * (self._token_time or 0.0)


def _size(count: int) -> int:
    """Rounds down to a power of two: steps of similar size take about the same time."""
    return 1 << (count.bit_length() - 1)


def moving_average(before: float | None, value: float) -> float:
    """Weighs a new measurement against the earlier ones. before: their average, None for the first measurement."""
    return value if before is None else TIME_DECAY * before + (1 - TIME_DECAY) * value
