"""Owners in processes of their own: killed, frozen, ended, forked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from mcp_proxy.backends.exchange import Backend, Exchange
from mcp_proxy.errors import BackendLost, BackendUnavailable, BackendUnreached, StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.wire.jsonrpc import Notification
from tests.relay.scene import PATIENCE, Node, Scene
from tests.relay.scripted import call, result_of
from tests.support.exchanges import listening, sent
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


class Owner:
    """A replica in a process of its own."""

    def __init__(self, url: str, prefix: str, lease: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.relay.owner", url, prefix, str(lease)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.replica_id = self.next_line()

    def next_line(self) -> str:
        """The next thing that it printed."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; a stop has happened when this returns."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitpid(self.process.pid, os.WUNTRACED)

    def close(self) -> None:
        """Ends it if it still runs."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Field:
    """A client in this process and an owner in another, with the same Redis and prefix."""

    def __init__(self, server: RedisServer, prefix: str, lease: float) -> None:
        self._connection = Connection(server.url)
        self.mailboxes = RedisMailboxes(self._connection, prefix, lease)
        self.prefix = prefix
        self.client = Node(self.mailboxes)
        self.client.relay.start()
        self.owner = Owner(server.url, prefix, lease)

    def close(self) -> None:
        """Ends both of them, the owner first."""
        self.owner.close()
        self.client.relay.close()
        self._connection.close()

    @property
    def backend(self) -> Backend:
        """The owner's child as the client sees it."""
        return self.client.relay.backend(self.owner.replica_id, "child")

    def ask(self, method: str) -> object:
        """The answer to one call."""
        return result_of(sent(self.backend, [call(method)], False, 5).receive(PATIENCE))

    def is_gone(self) -> bool:
        """Whether the client knows that the owner is gone."""
        return is_gone(self.client, self.owner.replica_id)


def is_gone(client: Node, replica: str) -> bool:
    """Whether a client knows that a replica is gone."""
    try:
        return client.relay.is_gone(replica)
    except StorageUnavailable:
        return False


@pytest.fixture
def make_field(redis_server: RedisServer, redis_prefix: str) -> Iterator[Callable[[float], Field]]:
    """Makes fields that are cleared when the test is over."""
    fields: list[Field] = []

    def make(lease: float) -> Field:
        fields.append(Field(redis_server, redis_prefix, lease))
        return fields[-1]

    yield make
    for field in fields:
        field.close()


def test_an_owner_in_another_process_serves(make_field: Callable[[float], Field]) -> None:
    field = make_field(15)
    assert field.ask("add") == "add"
    field.backend.notify(Notification("told"))
    assert [field.owner.next_line() for _ in range(2)] == ["add", "told"]


def test_calls_of_an_owner_that_was_killed_fail_well_within_the_lease(
    make_field: Callable[[float], Field],
) -> None:
    field = make_field(15)
    stream = listening(field.backend)
    exchange = sent(field.backend, [call("wait")], True, 60)
    assert field.owner.next_line() == "wait"
    field.owner.signal(signal.SIGKILL)
    began = time.monotonic()
    delivery = exchange.receive(PATIENCE)
    assert time.monotonic() - began < 5
    assert delivery is not None
    assert type(delivery.failure) is BackendLost
    eventually(lambda: stream.receive(0.05) is None and stream.is_over)
    assert field.is_gone()


def test_what_is_sent_to_an_owner_that_was_killed_is_not_left_hanging(
    make_field: Callable[[float], Field],
) -> None:
    field = make_field(15)
    assert field.ask("add") == "add"
    field.owner.signal(signal.SIGKILL)
    field.owner.process.wait(PATIENCE)
    began = time.monotonic()
    try:  # its mailbox is still there: an envelope to it may arrive, or be known not to
        delivery = sent(field.backend, [call("again")], False, 60).receive(PATIENCE)
        assert delivery is not None
        assert isinstance(delivery.failure, BackendLost)
    except BackendUnreached:
        pass
    with pytest.raises(BackendLost):
        field.backend.notify(Notification("x"))
    assert time.monotonic() - began < 8


def test_calls_of_an_owner_that_ends_in_order_fail_soon(
    make_field: Callable[[float], Field],
) -> None:
    field = make_field(15)
    exchange = sent(field.backend, [call("wait")], True, 60)
    assert field.owner.next_line() == "wait"
    assert field.owner.process.stdin is not None
    field.owner.process.stdin.close()
    assert field.owner.process.wait(PATIENCE) == 0
    delivery = exchange.receive(PATIENCE)
    assert delivery is not None
    assert type(delivery.failure) is BackendLost
    assert not field.mailboxes.is_open(field.owner.replica_id)


@pytest.mark.parametrize("pause", [0.0, 1.0], ids=["for its lease", "for longer than its lease"])
def test_an_owner_that_was_frozen_executes_nothing_of_its_backlog(
    make_field: Callable[[float], Field], redis_server: RedisServer, pause: float
) -> None:
    lease = 1.5
    field = make_field(lease)
    assert field.ask("before") == "before"
    with redis_server.client() as admin:
        key = f"{field.prefix}mailbox:{field.owner.replica_id}"
        eventually(lambda: admin.pttl(key) < 0.8 * lease * 1000)  # some time after a renewal
    assert field.ask("last") == "last"
    field.owner.signal(signal.SIGSTOP)
    exchanges = [sent(field.backend, [call(f"backlog{n}")], False, 60) for n in range(5)]
    eventually(lambda: not field.mailboxes.is_open(field.owner.replica_id))
    lapsed = time.monotonic()
    if pause:
        eventually(lambda: time.monotonic() > lapsed + pause)
    field.owner.signal(signal.SIGCONT)
    for exchange in exchanges:
        with pytest.raises((BackendLost, BackendUnavailable)):  # by its absence, or its own words
            raise_failure_of(exchange)
    eventually(lambda: field.mailboxes.is_open(field.owner.replica_id))
    # What arrives while it is not sure yet is refused, and may be sent again.
    eventually(lambda: _is_served(field))
    assert [field.owner.next_line() for _ in range(3)] == ["before", "last", "after"]


def raise_failure_of(exchange: Exchange) -> None:
    """Raises what became of a call."""
    delivery = exchange.receive(PATIENCE)
    assert delivery is not None
    assert delivery.failure is not None
    raise delivery.failure


def _is_served(field: Field) -> bool:
    with contextlib.suppress(BackendLost, BackendUnavailable):
        return field.ask("after") == "after"
    return False


def test_a_short_freeze_costs_nothing(make_field: Callable[[float], Field]) -> None:
    field = make_field(15)
    field.owner.signal(signal.SIGSTOP)
    exchange = sent(field.backend, [call("add")], False, 60)
    assert exchange.receive(0.3) is None
    field.owner.signal(signal.SIGCONT)
    assert result_of(exchange.receive(PATIENCE)) == "add"


def test_nobody_is_judged_by_a_store_that_has_just_come_back_empty(
    own_redis: Callable[..., RedisServer], redis_at: Callable[..., Connection]
) -> None:
    """The restart is so quick that no renewal fell into it."""
    server, lease = own_redis(), 2.0
    mailboxes = [RedisMailboxes(redis_at(server.url), "p:", lease) for _ in range(2)]
    with Scene(mailboxes[0]) as scene, server.client() as admin:
        client = scene.nodes[0]
        old_enough = time.monotonic() + lease + 0.2
        key = f"p:mailbox:{client.replica.id}"
        eventually(lambda: time.monotonic() > old_enough and admin.pttl(key) > 0.93 * lease * 1000)
        scene.nodes.append(owner := Node(mailboxes[1]))
        owner.relay.start()
        admin.flushall()
        server.stop()
        server.start()
        verdicts = set()
        while not mailboxes[0].is_open(owner.replica.id):
            verdicts.add(is_gone(client, owner.replica.id))
        assert verdicts <= {False}, "a replica that lives was said to be gone"
        assert client.ask(owner, call("later")) == "later"


def test_a_store_that_restarts_during_a_call_costs_at_most_that_call(
    own_redis: Callable[..., RedisServer],
) -> None:
    server = own_redis()
    field = Field(server, "p:", 3.0)
    try:
        exchange = sent(field.backend, [call("wait")], True, 60)
        assert field.owner.next_line() == "wait"
        server.stop()
        sent_meanwhile = sent(field.backend, [call("meanwhile")], False, 60)
        server.start()
        answer = sent_meanwhile.receive(PATIENCE)
        assert answer is not None
        assert result_of(answer) == "meanwhile"
        assert field.owner.next_line() == "meanwhile"
        assert field.ask("later") == "later"
        assert exchange.receive(0.1) is None  # it is still being executed
        field.owner.close()
        lost = exchange.receive(PATIENCE)
        assert lost is not None
        assert isinstance(lost.failure, BackendLost)
    finally:
        field.close()


def test_a_store_that_comes_back_empty_leaves_no_call_hanging(
    own_redis: Callable[..., RedisServer],
) -> None:
    server = own_redis()
    field = Field(server, "p:", 1.5)
    try:
        with redis.Redis.from_url(server.url) as admin:
            exchange = sent(field.backend, [call("wait")], True, 60)
            assert field.owner.next_line() == "wait"
            admin.flushall()
            assert eventually(lambda: field.mailboxes.is_open(field.owner.replica_id))
        assert field.ask("later") == "later"
        field.owner.close()
        lost = exchange.receive(PATIENCE)
        assert lost is not None
        assert isinstance(lost.failure, BackendLost)
    finally:
        field.close()


_FORK = """
import os, sys, time
from mcp_proxy.replica import Replica
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.relay.relay import Relay
from mcp_proxy.redis.client import Connection
from tests.relay.scripted import ScriptedBackend, call, result_of
from tests.support.exchanges import sent

url, prefix, lease = sys.argv[1], sys.argv[2], float(sys.argv[3])
connection, replica = Connection(url), Replica()
mailboxes = RedisMailboxes(connection, prefix, lease)
relay, child = Relay(mailboxes, replica), ScriptedBackend()
relay.serve(lambda child_id, begins: {"child": child}.get(child_id), lambda: None)
if sys.argv[4] == "used":
    relay.start()
    parent = replica.id
readable, writable = os.pipe()
asked, asking = os.pipe()
pid = os.fork()
if pid == 0:
    time.sleep(2 * lease)
    was_held = relay.is_held
    relay.start()
    os.write(writable, f"{replica.id} {was_held}".encode())
    os.close(writable)
    os.close(asking)
    os.read(asked, 1)
    relay.close()
    os._exit(0)
relay.start()
parent = replica.id
os.close(writable)
forked, was_held = b"".join(iter(lambda: os.read(readable, 1000), b"")).decode().split()
answer = sent(relay.backend(forked, "child"), [call("add")], False, 5).receive(10)
print(parent == replica.id != forked, mailboxes.is_open(parent), mailboxes.is_open(forked))
print(result_of(answer), sum(child.executed.values()), relay.is_held)
print(was_held, flush=True)
os.close(asking)
os.waitpid(pid, 0)
print(mailboxes.is_open(parent), mailboxes.is_open(forked), flush=True)
relay.close()
connection.close()
"""


@pytest.mark.parametrize("before", ["used", "unused"])
def test_a_fork_is_a_replica_of_its_own(
    redis_server: RedisServer, redis_prefix: str, before: str
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _FORK,
            redis_server.url,
            redis_prefix,
            "0.5",
            before,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    ids, use, was_held, closed = done.stdout.splitlines()
    assert ids == "True True True"
    assert use == "add 0 True"
    assert closed == "True False"
    assert was_held == "True"  # nobody can have declared dead what had not begun
