"""Mailboxes in Redis: what is really stored, and what happens when the server is away."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.storage.mailboxes import Envelope
from tests.support.lossy import LossyProxy
from tests.support.monitor import recorded_commands
from tests.support.outage import assert_unavailable
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together
from tests.support.waiting import eventually

CALLS: dict[str, Callable[[RedisMailboxes], object]] = {
    "renew": lambda mailboxes: mailboxes.renew("a"),
    "is_open": lambda mailboxes: mailboxes.is_open("a"),
    "post": lambda mailboxes: mailboxes.post([Envelope("a", b"1")]),
    "post several": lambda mailboxes: mailboxes.post([Envelope("a", b"1")] * 3),
    "collect": lambda mailboxes: mailboxes.collect("a", 0.01),
    "remove": lambda mailboxes: mailboxes.remove("a"),
    "uptime": lambda mailboxes: mailboxes.uptime(),
}

MakeMailboxes = Callable[..., RedisMailboxes]


@pytest.fixture
def mailboxes_at(redis_at: Callable[..., Connection]) -> MakeMailboxes:
    """Makes mailboxes as a replica has them."""

    def make(url: str, lease: float = 15.0, timeout: float = 5.0) -> RedisMailboxes:
        return RedisMailboxes(redis_at(url, timeout), "p:", lease)

    return make


def test_a_mailbox_is_one_stream_with_a_time_to_live(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes_at(own_server.url).renew("a")
    assert admin.keys("*") == [b"p:mailbox:a"]
    assert admin.type("p:mailbox:a") == b"stream"
    assert admin.xlen("p:mailbox:a") == 0
    assert 10_000 < admin.pttl("p:mailbox:a") <= 15_000


def test_a_renewal_is_one_script_with_one_key(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    mailboxes.renew("a")  # the server learns the script
    with recorded_commands(own_server) as commands:
        mailboxes.renew("a")
    ((name, _, keys, key, *_),) = commands
    assert (name, keys, key) == ("EVALSHA", "1", "p:mailbox:a")


def test_a_removal_is_one_script_with_one_key(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    mailboxes.remove("a")  # the server learns the script
    mailboxes.renew("a")
    mailboxes.post([Envelope("a", b"1")])
    with recorded_commands(own_server) as commands:
        assert mailboxes.remove("a") == [b"1"]
    assert [(name, keys, key) for name, _, keys, key, *_ in commands] == [
        ("EVALSHA", "1", "p:mailbox:a")
    ]


def test_what_is_left_are_bytes_with_a_client_that_decodes(own_server: RedisServer) -> None:
    with own_server.client(decode_responses=True) as client:
        mailboxes = RedisMailboxes(Connection(client), "p:")
        mailboxes.renew("a")
        mailboxes.post([Envelope("a", b"\xff read")])
        assert mailboxes.collect("a", 5) == [b"\xff read"]
        mailboxes.post([Envelope("a", b"\xff left")])
        assert mailboxes.remove("a") == [b"\xff left"]


def test_no_key_is_ever_without_a_time_to_live(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    uses: list[Callable[[], object]] = [
        lambda: mailboxes.renew("a"),
        lambda: mailboxes.post([Envelope("a", b"1"), Envelope("b", b"2")]),
        lambda: mailboxes.collect("a", 0.01),
        lambda: mailboxes.collect("b", 0.01),
        lambda: admin.delete("p:mailbox:a"),  # it expires between two uses
        lambda: mailboxes.post([Envelope("a", b"1")]),
        lambda: mailboxes.collect("a", 0.01),
        lambda: mailboxes.renew("a"),
    ]
    for use in uses:
        use()
        assert all(admin.pttl(key) > 0 for key in admin.keys("*"))
    assert admin.keys("*") == [b"p:mailbox:a"]


def test_a_renewal_that_meets_an_expiry_leaves_a_time_to_live(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url, lease=0.01)

    def renew() -> None:
        for _ in range(100):
            mailboxes.renew("a")
            mailboxes.post([Envelope("a", b"1"), Envelope("a", b"2")])

    run_together([renew] * 6)
    eventually(lambda: admin.keys("*") == [], message="a mailbox stayed for ever")


def test_a_mailbox_really_expires(own_server: RedisServer, mailboxes_at: MakeMailboxes) -> None:
    mailboxes = mailboxes_at(own_server.url, lease=0.05)
    mailboxes.renew("a")
    eventually(lambda: not mailboxes.is_open("a"), message="the mailbox did not expire")


def test_what_was_read_is_deleted(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    mailboxes.renew("a")
    for _ in range(20):
        mailboxes.post([Envelope("a", b"x" * 1000)] * 50)
        assert len(mailboxes.collect("a", 5)) == 50
        assert admin.xlen("p:mailbox:a") <= 50
    mailboxes.collect("a", 0.01)
    assert admin.xlen("p:mailbox:a") == 0
    assert mailboxes.is_open("a")


def test_prefixes_keep_replicas_apart(
    own_server: RedisServer, redis_at: Callable[..., Connection]
) -> None:
    connection = redis_at(own_server.url)
    one, other = RedisMailboxes(connection, "one:"), RedisMailboxes(connection, "other:")
    one.renew("a")
    assert not other.is_open("a")
    assert other.post([Envelope("a", b"1")]) == [False]


def test_the_uptime_is_the_servers(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    told = mailboxes_at(own_server.url).uptime()
    assert abs(told - admin.info("server")["uptime_in_seconds"]) <= 2


def test_a_patient_reader_stays_below_the_time_for_an_answer(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url, timeout=2)
    mailboxes.renew("a")
    began = time.monotonic()
    assert mailboxes.collect("a", 60) == []
    assert time.monotonic() - began < 2


def test_a_client_without_a_time_limit_is_not_waited_on_for_ever(own_server: RedisServer) -> None:
    with own_server.client(socket_timeout=None) as client:
        mailboxes = RedisMailboxes(Connection(client), "p:")
        mailboxes.renew("a")
        began = time.monotonic()
        assert mailboxes.collect("a", 600) == []
        assert time.monotonic() - began < 5


# --- a server that is away -----------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_stopped_server_is_unavailable_and_used_again_when_it_is_back(
    redis_server: RedisServer,
    call: Callable[[RedisMailboxes], object],
    redis_at: Callable[..., Connection],
) -> None:
    with LossyProxy(redis_server.port) as way:
        connection = redis_at(f"redis://127.0.0.1:{way.port}/0", 1)
        mailboxes = RedisMailboxes(connection, "p:", 15.0)
        call(mailboxes)
        back, way.target = way.target, 1
        connection.close()  # its connections end as the server's would
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            call(mailboxes)
        assert time.monotonic() - began < 3
        way.target = back
        call(mailboxes)
        mailboxes.remove("a")


def test_letters_and_mailboxes_outlive_a_restart(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    mailboxes.renew("a")
    mailboxes.post([Envelope("a", b"1"), Envelope("a", b"2")])
    own_server.stop()
    assert_unavailable(mailboxes, CALLS, within=5)
    own_server.start()
    assert mailboxes.renew("a") is True
    assert mailboxes.collect("a", 5) == [b"1", b"2"]
    assert mailboxes.uptime() < 60


def test_a_frozen_server_is_unavailable_within_the_timeout(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url, timeout=0.2)
    mailboxes.renew("a")
    own_server.pause()
    assert_unavailable(mailboxes, CALLS, within=3)
    own_server.resume()
    eventually(lambda: CALLS["is_open"](mailboxes) in (True, False))


def test_letters_that_were_read_while_the_server_went_come_again_not_never(
    own_server: RedisServer, mailboxes_at: MakeMailboxes
) -> None:
    """What was not deleted because the server was away may come twice; nothing is lost."""
    mailboxes = mailboxes_at(own_server.url, timeout=1)
    mailboxes.renew("a")
    mailboxes.post([Envelope("a", b"1")])
    assert mailboxes.collect("a", 5) == [b"1"]
    own_server.stop()
    with pytest.raises(StorageUnavailable):
        mailboxes.collect("a", 0.01)
    own_server.start()
    mailboxes.post([Envelope("a", b"2")])
    found: list[bytes] = []
    while b"2" not in found:
        found += mailboxes.collect("a", 1)
    assert found in ([b"2"], [b"1", b"2"])


@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_that_is_lost_repeats_letters_and_loses_none(
    redis_server: RedisServer, redis_prefix: str, count: int, redis_at: Callable[..., Connection]
) -> None:
    sent = [b"%d" % number for number in range(count)]
    with LossyProxy(redis_server.port) as way:
        connection = redis_at(f"redis://127.0.0.1:{way.port}/0")
        mailboxes = RedisMailboxes(connection, redis_prefix)
        mailboxes.renew("a")
        way.lose_answer_to(b"XADD")
        assert mailboxes.post([Envelope("a", data) for data in sent]) == [True] * count
        assert way.lost == 1
        assert mailboxes.collect("a", 5) == sent * 2
        connection.close()


def test_a_server_that_takes_no_more_is_unavailable(
    own_server: RedisServer, admin: redis.Redis, mailboxes_at: MakeMailboxes
) -> None:
    mailboxes = mailboxes_at(own_server.url)
    mailboxes.renew("a")
    admin.config_set("maxmemory", "1")
    with pytest.raises(StorageUnavailable):
        mailboxes.post([Envelope("a", b"1")])
    with pytest.raises(StorageUnavailable):
        mailboxes.post([Envelope("a", b"1")] * 2)
    admin.config_set("maxmemory", "0")
    assert mailboxes.post([Envelope("a", b"2")]) == [True]
