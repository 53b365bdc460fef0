"""OllamaRoute: takes JSON whatever its media type says, as Ollama does, but not from web pages."""

from fastapi import Request, Response

from api.gateway import GatewayRoute
from api.strict_json import Handler

JSON = (b"content-type", b"application/json")


class OllamaRoute(GatewayRoute):
    """A route for bodies that `curl -d` sends, which calls them forms.

    Browsers send such bodies for any web page, and say with `Origin` for which one: then the media type has to be
    right, for which a browser asks the server first.
    """

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if "origin" not in request.headers:
                others = [header for header in request.scope["headers"] if header[0] != JSON[0]]
                request = Request({**request.scope, "headers": [*others, JSON]}, request.receive)
            return await handler(request)

        return handle
