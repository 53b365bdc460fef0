"""AdmissionControl: places for sequences that run or wait, and how many of them a client may have."""

from collections import Counter


class AdmissionControl:
    """Half of the places are for whoever comes. Of the others each client has its part, which nobody else can take:
    however much one of them asks for, the others find room."""

    def __init__(self, num_places: int, num_clients: int) -> None:
        self.num_places = num_places
        self._own = num_places // (2 * num_clients)  # for each client alone
        self._num_shared = num_places - num_clients * self._own
        self._taken: Counter[str] = Counter()  # by client

    @property
    def max_sequences(self) -> int:
        """Places that one client can have."""
        return self._own + self._num_shared

    def has(self, num_more: int, client: str) -> bool:
        taken = {**self._taken, client: self._taken[client] + num_more}
        return sum(max(0, number - self._own) for number in taken.values()) <= self._num_shared

    def take(self, client: str) -> None:
        self._taken[client] += 1

    def leave(self, client: str) -> None:
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
