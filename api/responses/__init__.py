"""OpenAI's Responses API as a view of chat completions, and the store of its answers."""
