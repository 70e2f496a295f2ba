"""Six real stdio servers and two over HTTP in a group: each is to every client as it is alone."""

from __future__ import annotations

import time

from tests.clients.corner_steps import CLIENTS
from tests.clients.eight_servers import CARRIERS, eight_servers
from tests.support.redis_server import RedisServer


def groups_eight() -> None:
    """Every list of both eras, and every client, with one worker, four, and four over Redis."""
    differing = []
    with RedisServer() as redis:
        for carrier in CARRIERS:
            with eight_servers(carrier, redis.url) as eight:
                for what, listed, wanted in eight.lists():
                    print(f"  {carrier}: {what}: {len(listed)} entries", flush=True)
                    assert listed == wanted, (carrier, what)
                for client in CLIENTS:
                    began = time.monotonic()
                    found = eight.differences(client)
                    took = time.monotonic() - began
                    said = found or "all as alone"
                    print(f"  {carrier}: {client}: {said} ({took:.0f} s)", flush=True)
                    differing += [(carrier, client)] if found else []
    assert differing == []
