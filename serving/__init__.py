"""The models of this process: they take the requests of schemas.py and return its answers or chunks."""
