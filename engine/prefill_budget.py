"""PrefillBudget: how many tokens of prompts a step may compute beside decodes, learnt from the time of past steps."""

STRETCH = 1.3  # a mixed step may take this many times a decode-only step; more if many prompts wait
FIRST_TOKENS = 16  # of prompts in the first step that also decodes, from which is learnt what a token adds
FEWEST_TOKENS = 8  # of prompts in a step, however slow it is, so that prompts make progress
TIME_DECAY = 0.7  # the weight of earlier measurements beside a new one


class PrefillBudget:
    """Measures steps, and says how many tokens of prompts the next one may have."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # tokens of prompts in a step
        self._decode_times: dict[int, float] = {}  # number of decodes, rounded -> seconds of a decode-only step
        self._token_time: float | None = None  # seconds that a token of a prompt adds to a step

    def budget(self, num_decodes: int, num_prompts: int) -> int:
        """Returns the tokens of prompts in the next step. It grows with the number of waiting prompts per decode."""
        decode_time = self.decode_time(num_decodes)
        if decode_time is None or self._token_time == 0:
            return self.limit
        if self._token_time is None:
            return min(FIRST_TOKENS, self.limit)
        allowed = (STRETCH * (1 + num_prompts / num_decodes) - 1) * decode_time
        return max(min(FEWEST_TOKENS, self.limit), min(self.limit, int(allowed / self._token_time)))

    def note(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        if not num_decodes:
            return
        decode_time = self.decode_time(num_decodes)
        if not num_prompt_tokens:
            size = _size(num_decodes)
            self._decode_times[size] = moving_average(self._decode_times.get(size), seconds)
        elif decode_time is not None:
            added = max(0.0, seconds - decode_time) / num_prompt_tokens
            self._token_time = moving_average(self._token_time, added)

    def decode_time(self, num_decodes: int) -> float | None:
        """Seconds of a decode-only step of this size, or else of the nearest smaller or larger one; None: unknown."""
        size = _size(num_decodes)
        sizes = sorted(self._decode_times, key=lambda other: (other > size, abs(other - size)))
        return self._decode_times[sizes[0]] if sizes else None


def _size(count: int) -> int:
    """Rounds down to a power of two: steps of similar size take about the same time."""
    return 1 << (count.bit_length() - 1)


def moving_average(before: float | None, value: float) -> float:
    """Weighs a new measurement against the earlier ones. before: their average, None for the first measurement."""
    return value if before is None else TIME_DECAY * before + (1 - TIME_DECAY) * value
