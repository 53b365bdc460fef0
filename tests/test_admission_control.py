"""Who has room while others ask for much."""

import random

import pytest

from engine.admission_control import AdmissionControl


@pytest.mark.parametrize("num_places", [1, 2, 10, 1056])
def test_one_client_alone_has_all_of_it(num_places: int) -> None:
    room = AdmissionControl(num_places, 1)
    assert room.max_sequences == num_places
    for _ in range(num_places):
        assert room.has(1, "a")
        room.take("a")
    assert not room.has(1, "a")
    room.leave("a")
    assert room.has(1, "a") and not room.has(2, "a")


@pytest.mark.parametrize("num_clients", [2, 3, 7])
def test_whatever_others_take_a_client_finds_its_own_part(num_clients: int) -> None:
    rng, clients = random.Random(num_clients), [f"c{number}" for number in range(num_clients)]
    room, part = AdmissionControl(100, num_clients), 100 // (2 * num_clients)
    taken = dict.fromkeys(clients, 0)
    for _ in range(3000):
        client, number = rng.choice(clients[1:]), rng.randrange(1, 30)
        if rng.random() < 0.6 and room.has(number, client):
            taken[client] += number
            for _ in range(number):
                room.take(client)
        elif taken[client]:
            taken[client] -= 1
            room.leave(client)
        assert sum(taken.values()) + part <= 100 and max(taken.values()) <= room.max_sequences
        assert room.has(part, clients[0])
    assert sum(taken.values()) > 50, "it was nearly full"
