"""Which provider serves a model: a table of prefixes."""

from providers.base import Provider


class Router:
    """Prefix -> provider; the empty prefix is the local model's."""

    def __init__(self, routes: dict[str, Provider]) -> None:
        self.routes = routes

    def resolve(self, model: str) -> tuple[Provider, str]:
        """The provider of the longest prefix that fits, and the model's name there."""
        prefix = max((prefix for prefix in self.routes if model.startswith(prefix)), key=len)
        return self.routes[prefix], model[len(prefix) :]
