"""Replicas that share mailboxes: their relays, and the children that they serve."""

from __future__ import annotations

import threading
from types import TracebackType

from mcp_proxy.backends.exchange import Backend
from mcp_proxy.background import Worker, Workers
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica
from mcp_proxy.storage.mailboxes import Mailboxes
from mcp_proxy.wire.jsonrpc import Request
from tests.relay.scripted import ScriptedBackend, result_of
from tests.support.exchanges import sent

#: Seconds that anything may take here before a test fails.
PATIENCE = 10.0


class Node:
    """A replica with its relay and its children."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.replica = Replica()
        self.workers = Workers()
        self.relay = Relay(mailboxes, self.replica, self.workers)
        self.children: dict[str, ScriptedBackend] = {"child": ScriptedBackend()}
        self.lapsed = threading.Event()
        self.relay.serve(lambda child_id, begins: self.children.get(child_id), self.lapsed.set)

    @property
    def child(self) -> ScriptedBackend:
        """The child that every node has."""
        return self.children["child"]

    def worker(self, name: str) -> Worker:
        """A thread of the relay by its name."""
        (found,) = (worker for worker in self.workers.started if worker.name == name)
        return found

    def reach(self, owner: Node, child: str = "child") -> Backend:
        """A child of another node, as this one sees it."""
        return self.relay.backend(owner.replica.id, child)

    def ask(self, owner: Node, request: Request, child: str = "child") -> object:
        """The result of one call that is answered."""
        exchange = sent(self.reach(owner, child), [request], False, 5)
        try:
            return result_of(exchange.receive(PATIENCE))
        finally:
            exchange.close()

    @property
    def calls(self) -> int:
        """How many calls to and from other replicas this node's relay has."""
        return self.relay.calls


class Scene:
    """Nodes that are closed when the test is over; each has its mailbox open."""

    def __init__(self, *mailboxes: Mailboxes) -> None:
        self.nodes = [Node(one) for one in mailboxes]
        for node in self.nodes:
            node.relay.start()

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self.nodes:
            node.relay.close()
