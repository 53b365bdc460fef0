"""Anthropic's Messages API as a view of chat completions."""
