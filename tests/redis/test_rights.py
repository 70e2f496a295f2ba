"""The rights that a user of Redis needs for a proxy: all of these, and no others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest
import redis

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.mailboxes import Envelope
from tests.redis.conftest import MakeStorage
from tests.storage.stores import record
from tests.support.redis_forms import (
    ADMIN_PASSWORD,
    CLUSTER_COMMANDS,
    COMMANDS,
    PASSWORD,
    limited_user,
)
from tests.support.redis_server import RedisServer


def everything(storage: RedisStorage) -> None:
    """Everything that a proxy asks of Redis."""
    storage.check()
    storage.version()
    storage.eviction()
    storage.create(record())
    storage.load("s")
    storage.peek("s")
    storage.exists("s")
    storage.issued("s")
    storage.swap(record(), record(a="1"))
    storage.delete("s")
    _log_events(storage)
    _exchange_letters(storage)


def _log_events(storage: RedisStorage) -> None:
    log = storage.event_log()
    first = log.append("s", "stream", b"1", False)
    log.append("s", "stream", b"2", True)
    log.find("s", first)
    log.read("s", first, 0)
    large = b"x" * (1 << 20)
    for _ in range(6):  # so that the bytes of the log are too many, and some are taken away
        log.append("s", "stream", large, False)
    log.forget("s")


def _exchange_letters(storage: RedisStorage) -> None:
    mailboxes = RedisMailboxes(storage.connection, storage.prefix)
    mailboxes.renew("r")
    mailboxes.renew("r")
    mailboxes.is_open("r")
    mailboxes.post([Envelope("r", b"1")])
    mailboxes.post([Envelope("r", b"2"), Envelope("r", b"3")])
    for _ in range(2):
        mailboxes.collect("r", 0.01)
    mailboxes.uptime()
    mailboxes.remove("r")


def url_of(server: RedisServer, user: str, scheme: str = "redis") -> str:
    """The address of a server for one of its users."""
    return f"{scheme}://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server that knows a user without each of the rights."""
    users = [limited_user(*COMMANDS, name="complete")]
    for missing in COMMANDS:
        others = [command for command in COMMANDS if command != missing]
        users.append(limited_user(*others, name=f"without-{missing}"))
    with RedisServer(password=ADMIN_PASSWORD, settings=users) as running:
        yield running


def as_denied(server: RedisServer, command: str) -> str:
    """What a server calls a command that it denies: before version 7 without the second word."""
    return command if server.version >= (7,) else command.partition("|")[0]


@pytest.fixture
def forget_scripts(server: RedisServer) -> None:
    """As after a restart."""
    with server.client() as admin:
        admin.script_flush()


@pytest.mark.usefixtures("forget_scripts")
def test_these_rights_are_enough(server: RedisServer, make_storage: MakeStorage) -> None:
    everything(make_storage(url_of(server, "complete")))
    with server.client() as admin:
        denied = {(entry["reason"], entry["object"]) for entry in admin.acl_log()}
    # redis-py says its name and version, and goes on where it may not.
    assert denied <= {("command", as_denied(server, "client|setinfo"))}


@pytest.mark.usefixtures("forget_scripts")
@pytest.mark.parametrize("missing", COMMANDS)
def test_each_of_them_is_needed_and_named(
    server: RedisServer, make_storage: MakeStorage, missing: str
) -> None:
    storage = make_storage(url_of(server, f"without-{missing}"))
    with pytest.raises(StorageUnavailable, match="denies the user of this proxy") as caught:
        everything(storage)
    in_scripts = "a command that it needs"
    assert str(caught.value).endswith((f"the command {missing.upper()}", in_scripts))
    assert caught.value.status == 503
    assert isinstance(caught.value.__cause__, redis.ResponseError)


CALLS: dict[str, Callable[[RedisStorage], object]] = {
    "load": lambda storage: storage.load("s"),
    "create": lambda storage: storage.create(record()),
    "swap": lambda storage: storage.swap(record(), record(a="1")),
    "append": lambda storage: storage.event_log().append("s", "stream", b"1", False),
    "post": lambda storage: RedisMailboxes(storage.connection, storage.prefix).post(
        [Envelope("r", b"1"), Envelope("r", b"2")]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_keys_of_others_are_denied(server: RedisServer, call: str) -> None:
    others = RedisStorage(url_of(server, "complete"), prefix="of-others:")
    with (
        contextlib.closing(others) as storage,
        pytest.raises(StorageUnavailable, match="the keys with its prefix"),
    ):
        CALLS[call](storage)


@pytest.mark.parametrize("missing", CLUSTER_COMMANDS)
def test_a_cluster_needs_a_little_more(make_storage: MakeStorage, missing: str) -> None:
    more = [command for command in CLUSTER_COMMANDS if command != missing]
    user = limited_user(*COMMANDS, *more, name="short")
    with RedisServer(password=ADMIN_PASSWORD, settings=[user], is_node=True) as node:
        with node.client() as admin:
            admin.execute_command("CLUSTER ADDSLOTS", *range(16384))
        storage = make_storage(url_of(node, "short", "redis+cluster"))
        with pytest.raises(StorageUnavailable) as caught:
            storage.check()
    named = as_denied(node, missing).upper()
    assert str(caught.value).endswith(f"denies the user of this proxy the command {named}")
