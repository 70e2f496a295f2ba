"""Eight servers in a group: clients see of each of them what they see of it alone.

`scripts/prove groups-eight` has every client take every way; here each SDK takes one in each era.
"""

from __future__ import annotations

import pytest

from tests.clients.eight_servers import FOUR, ONE, REDIS, eight_servers
from tests.support.redis_server import RedisServer

_CLIENTS = {
    ONE: ("python-1", "typescript-2-modern"),
    FOUR: ("go-auto", "typescript-1"),
    REDIS: ("python-2-modern", "go-legacy"),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("carrier", _CLIENTS)
def test_each_server_is_as_it_is_alone(carrier: str, redis_server: RedisServer) -> None:
    with eight_servers(carrier, redis_server.url) as eight:
        if carrier == ONE:
            for what, listed, wanted in eight.lists():
                assert listed == wanted, what
        for client in _CLIENTS[carrier]:
            assert eight.differences(client) == {}, client
