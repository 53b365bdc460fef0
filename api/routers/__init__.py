"""The endpoints, one file per group. `api/endpoints.py` finds each file here that has a `router`."""
