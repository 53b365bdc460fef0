"""ArgumentError: what is wrong with a call of the embedder. It names the parameter, and knows no request."""


class ArgumentError(ValueError):
    """An argument that the model cannot compute with."""

    def __init__(self, message: str, argument: str) -> None:
        """argument: the name of the parameter of Embedder.embed or Embedder.score"""
        super().__init__(message)
        self.argument = argument


class TextTooLong(ArgumentError):
    """A text has more tokens than the model reads, and the caller does not allow to cut it."""
