"""Models on other machines, and what their providers say differently from OpenAI."""
