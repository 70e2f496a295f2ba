"""Fixtures of the mailboxes' tests: every kind of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mcp_proxy.storage.mailboxes import Mailboxes
from tests.storage.offices import LocalOffice, Office, RedisOffice
from tests.storage.stores import CLIENTS
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["memory", *CLIENTS])
def office(request: pytest.FixtureRequest) -> Iterator[Office]:
    """Each kind of mailboxes in turn."""
    if request.param == "memory":
        yield LocalOffice()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with ExitStack() as stack:
        admin = stack.enter_context(server.client())
        client = stack.enter_context(server.client(**CLIENTS[request.param]))
        office = RedisOffice(client, admin, request.getfixturevalue("redis_prefix"))
        stack.callback(office.mailboxes.close)
        yield office


@pytest.fixture
def mailboxes(office: Office) -> Mailboxes:
    """The mailboxes of the office."""
    return office.mailboxes
