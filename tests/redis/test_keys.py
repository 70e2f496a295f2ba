"""Every command has one key, so that a Cluster can serve it, whichever node has that key."""

from __future__ import annotations

import contextlib

from mcp_proxy.errors import SessionNotFound
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.mailboxes import Envelope
from tests.storage.stores import record
from tests.support.monitor import recorded_commands
from tests.support.redis_server import RedisServer

# What a connection says before its first command, and what is asked of each node.
KEYLESS = {"HELLO", "SELECT", "CLIENT", "AUTH", "PING", "INFO", "READONLY"}


def use_everything(storage: RedisStorage) -> None:
    """Each operation of the records, of the log and of the mailboxes, with several of each."""
    storage.check()
    for _ in range(2):
        storage.keep("name", "value", 60)
    storage.kept("name")
    for name in ("s", "t"):
        storage.create(record(name))
        storage.load(name)
        storage.peek(name)
        storage.exists(name)
        storage.swap(record(name), record(name, a="1"))
        storage.issued(name)
        storage.delete(name)
        with contextlib.suppress(SessionNotFound):
            storage.load(name)
    log = storage.event_log()
    event = log.append("s", "a", b"1", False)
    log.append_all("s", "a", [b"2", b"3"], True)
    log.find("s", event)
    log.read("s", event, 0)
    log.forget("s")
    mailboxes = storage.mailboxes()
    for replica in ("a", "b"):
        mailboxes.renew(replica)
        mailboxes.is_open(replica)
    mailboxes.post([Envelope("a", b"1"), Envelope("b", b"2"), Envelope("a", b"3")])
    for replica in ("a", "b"):
        mailboxes.collect(replica, 1)
        mailboxes.collect(replica, 0.01)
        mailboxes.remove(replica)
    mailboxes.uptime()


def test_every_command_names_one_key(redis_server: RedisServer, redis_prefix: str) -> None:
    storage = RedisStorage(redis_server.url, prefix=redis_prefix)
    use_everything(storage)  # so that the server knows the scripts
    with recorded_commands(redis_server) as commands:
        use_everything(storage)
    storage.close()
    used = set()
    with redis_server.client() as admin:
        for words in commands:
            if words[0].upper() not in KEYLESS:
                (key,) = admin.command_getkeys(*words)
                assert str(key).startswith(redis_prefix), words
                used.add(words[0].upper())
    assert {"GETEX", "SET", "GET", "EXISTS", "DEL", "EVALSHA", "XADD", "XREAD", "XDEL"} <= used
