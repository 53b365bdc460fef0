"""One HTTP connection: its bounds, its API key, its deadline, and what happens when the client disconnects."""
