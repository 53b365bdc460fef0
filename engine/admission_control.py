"""AdmissionControl: bounds how many sequences run or wait, in all and for each client."""

from collections import Counter


class AdmissionControl:
    """Half of the places are shared. The others are reserved in equal parts for the clients, so that however many
    requests one client sends, the others still find places."""

    def __init__(self, num_places: int, num_clients: int) -> None:
        self.num_places = num_places
        self._num_reserved = num_places // (2 * num_clients)  # for each client
        self._num_shared = num_places - num_clients * self._num_reserved
        self._taken: Counter[str] = Counter()  # client -> places

    @property
    def max_sequences(self) -> int:
        """The most places that one client can have."""
        return self._num_reserved + self._num_shared

    def has(self, num_more: int, client: str) -> bool:
        """Returns whether the client can take `num_more` places."""
        taken = {**self._taken, client: self._taken[client] + num_more}
        return sum(max(0, number - self._num_reserved) for number in taken.values()) <= self._num_shared

    def take(self, client: str) -> None:
        self._taken[client] += 1

    def leave(self, client: str) -> None:
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
