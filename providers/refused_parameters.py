"""RefusedParameters: which parameters a model refused, so that it is not sent them again."""

import re
from collections.abc import Iterable

from errors import UpstreamError

MAX_REMEMBERED = 1000  # models
STATUSES = (400, 422)
_NAMED = r"[`'\"\[.]{name}[`'\"\].]|(?:parameter|argument|property|field)s?:? {name}\b"
_REFUSES = re.compile(r"deprecated|unsupported|unrecognized|unexpected|unknown|not (supported|permitted|allowed)", re.I)


class RefusedParameters:
    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}  # by the model

    def of(self, model: str) -> frozenset[str]:
        return self._names.get(model, frozenset())

    def named_in(self, error: UpstreamError, names: Iterable[str]) -> frozenset[str]:
        """Returns those of the parameters that a provider's error says it does not take.

        It has them in quotes, or behind a word for them.
        """
        if error.status not in STATUSES or not _REFUSES.search(error.message):
            return frozenset()
        return frozenset(name for name in names if re.search(_NAMED.format(name=name), error.message))

    def remember(self, model: str, names: frozenset[str]) -> None:
        if len(self._names) < MAX_REMEMBERED or model in self._names:
            self._names[model] = self.of(model) | names
