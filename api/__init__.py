"""The HTTP interface: endpoints, their errors, their streams, and what is relayed to other providers."""
