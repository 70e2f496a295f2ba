"""Calls that tests of several replicas have in common."""

from __future__ import annotations

import contextlib
from typing import Any

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.wire.sse import Event
from tests.support.front import Answer, McpClient
from tests.support.proxies import Replicas
from tests.support.waiting import eventually

NOTE = "notifications/message"


def seen(client: McpClient) -> list[dict[str, Any]]:
    """What has reached the server of this session; takes no message of the server away."""
    answer = client.call("seen", Accept="application/json")
    messages: list[dict[str, Any]] = answer.message()["result"]["messages"]
    return messages


def methods(client: McpClient) -> list[str]:
    """The methods among it."""
    return [message["method"] for message in seen(client) if "method" in message]


def hold(client: McpClient, name: str, key: Any = None, **params: Any) -> Answer:
    """A call that reports progress and is answered when `release` says so."""
    meta = {"progressToken": name}
    return client.call("hold", {"name": name, "_meta": meta, **params}, key)


def release(client: McpClient, name: str) -> None:
    """Lets a held call go on."""
    client.call("release", {"name": name}, Accept="application/json").message()


def say(client: McpClient, number: int) -> None:
    """Has the server say something that belongs to no call, before anything that is asked later."""
    params = {"method": NOTE, "params": {"n": number}}
    client.call("notify", params, Accept="application/json").message()


def said(event: Event) -> int:
    """Which `say` an event is from."""
    import json

    number: int = json.loads(event.data or b"")["params"]["n"]
    return number


def judging(several: Replicas) -> None:
    """Waits until every replica is long enough there to judge others."""
    for replica in several.each:
        replica.app.owner.relay.start()

    def has_judged() -> bool:
        with contextlib.suppress(StorageUnavailable):
            return all(replica.app.owner.relay.is_gone("nobody") for replica in several.each)
        return False

    eventually(has_judged)


def pid_of(client: McpClient) -> int:
    """The process that answers."""
    pid: int = client.result("count")["pid"]
    return pid
