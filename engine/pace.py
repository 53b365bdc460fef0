"""Pace: how much of the waiting prompts a step may compute beside running decodes, learnt from how long steps take."""

STRETCH = 1.8  # times as long as a step of decodes alone, at most, is what a step with prompts may take
FEWEST_TOKENS = 8  # of prompts in a step, however slow: they must come on
MEMORY = 0.8  # how much an earlier measurement counts beside a new one
LARGEST_CHANGE = 1.5  # of the budget from step to step: one slow step may be somebody else's fault


class Pace:
    def __init__(self, most: int) -> None:
        self.most = most  # tokens
        self._budget = float(most)
        self._decode_time: float | None = None  # seconds of a step of decodes alone

    @property
    def budget(self) -> int:
        """Tokens of prompts in the next step that has decodes."""
        return max(1, min(self.most, int(self._budget)))

    def note(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not num_decodes:
            return
        if not num_prompt_tokens:
            before = self._decode_time if self._decode_time is not None else seconds
            self._decode_time = MEMORY * before + (1 - MEMORY) * seconds
        elif self._decode_time is not None and (num_prompt_tokens >= self.budget or seconds > self._allowed):
            change = min(LARGEST_CHANGE, max(1 / LARGEST_CHANGE, self._allowed / seconds))
            self._budget = min(float(self.most), max(float(FEWEST_TOKENS), self._budget * change))

    @property
    def _allowed(self) -> float:
        return STRETCH * (self._decode_time or 0.0)
