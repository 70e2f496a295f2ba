"""A replica in a process of its own, over Redis: serves one child and prints what that executes.

Arguments: the URL of Redis, the prefix of the keys, the lease in seconds. The first line printed is
the replica's id; then one line for each call. It ends with its standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica
from mcp_proxy.wire.jsonrpc import Notification, Response
from tests.relay.scripted import ScriptedBackend, silent


class PrintingBackend(ScriptedBackend):
    """Prints the method of each call, as soon as it is executed."""

    def send(self, exchange: Exchange) -> None:
        print(*[request.method for request in exchange.requests], flush=True)
        super().send(exchange)

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        print(notification.method, flush=True)
        super().notify(notification)

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        print("response", flush=True)
        super().respond(response)


def main(url: str, prefix: str, lease: str) -> None:
    """Serves until the standard input ends."""
    replica = Replica()
    connection = Connection(url)
    relay = Relay(RedisMailboxes(connection, prefix, float(lease)), replica)
    child = PrintingBackend(wait=silent)
    relay.serve(lambda child_id, begins: {"child": child}.get(child_id), lambda: None)
    relay.start()
    print(replica.id, flush=True)
    sys.stdin.read()
    relay.close()
    connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
