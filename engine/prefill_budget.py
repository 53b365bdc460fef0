"""PrefillBudget: the number of prompt tokens that a step may compute beside running decodes, learnt from past steps."""

STRETCH = 1.3  # times as long as a step of decodes alone is what a step with prompts may take, and more the more wait
FEWEST_TOKENS = 8  # of prompts in a step, however slow: they must come on
DECAY = 0.7  # how much earlier measurements count beside a new one


class PrefillBudget:
    def __init__(self, most: int) -> None:
        self.most = most  # tokens
        self._decode_times: dict[int, float] = {}  # seconds of a step of about so many decodes alone
        self._token_time: float | None = None  # seconds that a token of a prompt adds to a step

    def budget(self, num_decodes: int, num_prompts: int) -> int:
        """Tokens of prompts in the next step: the fewer streams it delays for the more that wait, the more."""
        decode_time = self.decode_time(num_decodes)
        if decode_time is None or not self._token_time:
            return self.most
        allowed = (STRETCH * (1 + num_prompts / num_decodes) - 1) * decode_time
        return max(min(FEWEST_TOKENS, self.most), min(self.most, int(allowed / self._token_time)))

    def note(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not num_decodes:
            return
        decode_time = self.decode_time(num_decodes)
        if not num_prompt_tokens:
            size = _size(num_decodes)
            self._decode_times[size] = _mean(self._decode_times.get(size), seconds)
        elif decode_time is not None:
            added = max(0.0, seconds - decode_time) / num_prompt_tokens
            self._token_time = _mean(self._token_time, added)

    def decode_time(self, num_decodes: int) -> float | None:
        """Of steps with as many decodes, or else with the next fewer, or more."""
        size = _size(num_decodes)
        known = sorted(self._decode_times, key=lambda other: (other > size, abs(other - size)))
        return self._decode_times[known[0]] if known else None


def _size(count: int) -> int:
    """1, 2, 4, 8 and so on: counts that take about the same."""
    return 1 << (count.bit_length() - 1)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else DECAY * before + (1 - DECAY) * value
