"""Surrogates: the halves of characters beyond U+FFFF, which JSON can escape one by one and UTF-8 cannot encode."""


def whole(text: str) -> str:
    """Returns a text whose halves are joined; one without its other half becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class SurrogateJoiner:
    """Joins the halves of characters that come in two pieces of a text."""

    def __init__(self) -> None:
        self._half = ""

    def put(self, piece: str) -> str:
        """Returns what is certain: a first half at the end waits for the second one."""
        text, self._half = self._half + piece, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return whole(text)
