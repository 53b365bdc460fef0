"""The HTTP interface: endpoints, their errors and streams, and the relay to other providers."""
