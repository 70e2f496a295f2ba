"""What a URL may say, what is wrong with it, and that reading it sends nothing."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from mcp_proxy.app import storage_of
from mcp_proxy.config import from_values
from mcp_proxy.errors import ConfigError, StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.storage import RedisStorage
from tests.redis.conftest import MakeStorage
from tests.support.redis_forms import PASSWORD, SENTINEL_PASSWORD, Form, OneServer
from tests.support.threads import run_together

GOOD = [
    "redis://127.0.0.1:1/3",
    "redis://me:secret@127.0.0.1:1",
    "rediss://127.0.0.1:1/0?ssl_ca_certs=/no/such/file&ssl_cert_reqs=required",
    "rediss://127.0.0.1:1?ssl_check_hostname=no&ssl_cert_reqs=none",
    "unix:///no/such.sock?db=2",
    "unix://me:secret@/no/such.sock",
    "redis+sentinel://127.0.0.1:1/service",
    "redis+sentinel://me:secret@127.0.0.1:1,127.0.0.1:2/service/3",
    "redis+sentinel://127.0.0.1:1/service?db=3&socket_timeout=1&sentinel_username=me",
    "rediss+sentinel://127.0.0.1:1/service?sentinel_password=secret&ssl_ca_certs=/no/such/file",
    "redis+cluster://127.0.0.1:1",
    "redis+cluster://me:secret@127.0.0.1:1,127.0.0.1:2/0?socket_timeout=1",
    "rediss+cluster://127.0.0.1:1,[::1]:1?ssl_ca_certs=/no/such/file",
]

BAD = [
    "",
    "127.0.0.1:6379",
    "http://127.0.0.1",
    "redis://h:port",
    "redis://[::1",
    "redis://h?nonsense=1",
    "redis://h?db=x",
    "redis://h?sentinel_password=hunter2",
    "redis://me:hunter\u2100@h",
    "rediss://h?ssl_cert_reqs=maybe",
    "rediss://h?ssl_min_version=hunter2",
    "unix://",
    "unix://me:hunter2@",
    "redis+sentinel://me:hunter2@h:1",
    "redis+sentinel://me:hunter2@h:1/",
    "redis+sentinel://me:hunter2@/service",
    "redis+sentinel://me:hunter2@h:1,/service",
    "redis+sentinel://me:hunter2@h:port/service",
    "redis+sentinel://me:hunter2@h:1/service/x",
    "redis+sentinel://me:hunter2@h:1/service/0/1",
    "redis+sentinel://me:hunter/2@h:1/service",
    "redis+sentinel://me:hunter2@h:1/service?nonsense=hunter2",
    "rediss+sentinel://me:hunter2@h:1/service?ssl_cert_reqs=maybe",
    "redis+cluster://me:hunter2@",
    "redis+cluster://me:hunter2@h:port",
    "redis+cluster://me:hunter2@h:1,",
    "redis+cluster://me:hunter/2@h:1",
    "redis+cluster://me:hunter2@h:1/service",
    "redis+cluster://me:hunter2@h:1/1",
    "redis+cluster://me:hunter2@h:1?db=1",
    "redis+cluster://me:hunter2@h:1?nonsense=hunter2",
    "rediss+cluster://me:hunter2@h:1?ssl_cert_reqs=maybe",
    "redis+unix://me:hunter2@h",
]


@pytest.mark.parametrize("url", GOOD)
def test_nobody_is_asked_before_the_first_use(url: str) -> None:
    connection = Connection(url, timeout=0.5)
    connection.close()
    assert "secret" not in repr(connection)
    storage = RedisStorage(connection)
    for call in (storage.check, storage.version, lambda: storage.load("s")):
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert "secret" not in "".join(traceback.format_exception(caught.value))
    connection.close()


@pytest.mark.parametrize("url", BAD)
def test_what_cannot_be_read_is_said_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read; .*redis\+sentinel://") as caught:
        Connection(url, timeout=1)
    assert "hunter" not in "".join(traceback.format_exception(caught.value))
    if url:
        with pytest.raises(ConfigError, match=r"redis_url\) cannot be read") as refused:
            storage_of(from_values({"redis_url": url}))
        assert "hunter" not in "".join(traceback.format_exception(refused.value))


def test_the_query_overrides_what_the_proxy_would_say(form: Form) -> None:
    separator = "&" if "?" in form.url else "?"
    connection = Connection(f"{form.url}{separator}socket_timeout=1.5", timeout=5)
    assert connection.block_time == pytest.approx(0.75)
    connection.close()


def test_a_blocking_command_ends_well_before_the_time_for_answers(form: Form) -> None:
    for timeout, most in ((5, 2.0), (1, 0.5)):
        connection = Connection(form.url, timeout=timeout)
        assert most / 2 <= connection.block_time <= most
        connection.close()


def test_a_wrong_password_is_named_as_the_reason(form: Form, make_storage: MakeStorage) -> None:
    url = form.url.replace("p%40ss", "guess")
    storage = make_storage(url, timeout=2)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="user name or password") as caught:
            storage.exists("s")
        said = "".join(traceback.format_exception(caught.value))
        for secret in ("guess", PASSWORD, SENTINEL_PASSWORD):
            assert secret not in said


# --- TLS -----------------------------------------------------------------------------------------


def test_tls_is_really_spoken(form: Form, make_storage: MakeStorage) -> None:
    before = [gate.encrypted for gate in form.gates]
    make_storage(form.url).connection.ping()
    for gate, count in zip(form.gates, before, strict=True):
        assert gate.encrypted > count


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("server", "x").replace("ca.pem", "client.pem"),
        lambda url: url.replace("ca.pem", "nothing.pem"),
        lambda url: url.partition("ssl_ca_certs")[0],
        lambda url: re.sub("&ssl_(certfile|keyfile)=[^&]*", "", url),
        lambda url: url.replace("rediss", "redis"),
    ],
    ids=["another authority", "no such file", "no authority", "no certificate", "no TLS"],
)
def test_tls_that_fails_is_a_store_that_cannot_be_reached(
    change: Callable[[str], str], make_storage: MakeStorage
) -> None:
    with OneServer("tls") as server:
        url = change(server.url)
        if url.startswith("redis:"):
            url = url.partition("?")[0]
            assert server.certificates is not None
            url = url.replace(str(server.gates[0].port), str(_never_plain(server)))
        storage = make_storage(url, timeout=2)
        with pytest.raises(StorageUnavailable):
            storage.check()


def _never_plain(server: OneServer) -> int:
    """A port that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- nobody there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["redis://{0}", "redis+sentinel://{0},{1},{2}/service", "redis+cluster://{0},{1},{2}"]
)
def test_many_threads_do_not_wait_one_after_another_for_nobody(scheme: str) -> None:
    with contextlib.ExitStack() as silent:
        addresses = []
        for _ in range(3):
            listener = silent.enter_context(contextlib.closing(socket.create_server(("", 0))))
            addresses.append(f"127.0.0.1:{listener.getsockname()[1]}")
        storage = RedisStorage(scheme.format(*addresses), timeout=1)

        def ask() -> float:
            began = time.monotonic()
            with pytest.raises(StorageUnavailable):
                storage.load("s")
            return time.monotonic() - began

        spent = run_together([ask] * 16)
        assert max(spent) < 3.5
        storage.close()


def test_a_client_of_ones_own_keeps_its_own_limits() -> None:
    with redis.Redis(socket_timeout=0.5) as client:
        assert Connection(client).block_time == 0.25
    with redis.Redis() as client:
        assert Connection(client).block_time == 2.0


def test_who_waits_for_a_cluster_waits_no_longer_than_for_an_answer() -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(12)]
        hosts = ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in silent)
        connection = Connection(f"redis+cluster://{hosts}", 1)
        connecting = pool.submit(lambda: connection.client)  # a half second for each host
        select.select(silent, [], [])  # the first of them, in an order that redis-py draws
        with pytest.raises(StorageUnavailable):
            _ = connection.client
        assert not connecting.done()
        with pytest.raises(StorageUnavailable):
            connecting.result(60)
