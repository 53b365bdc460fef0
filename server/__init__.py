"""One HTTP connection: its bounds, its keys, its time, and what becomes of it when the client leaves."""
