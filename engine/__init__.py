"""Token ids in, token ids out. It knows neither HTTP, nor text, nor the wire format."""
