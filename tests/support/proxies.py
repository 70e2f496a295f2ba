"""Starts what a test talks to, in one of the two ways, and ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

from mcp_proxy import Application, ProxyConfig, create_app
from mcp_proxy.config import from_values
from tests.support.front import SCRIPTED, HttpFront, McpClient, WsgiFront
from tests.support.proxy_process import ProxyProcess


class Proxy(Protocol):
    """A proxy in front of the scripted server."""

    def client(self) -> McpClient:
        """A client without a session."""
        ...


class WsgiProxy:
    """An application in this process."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def client(self) -> McpClient:
        return McpClient(WsgiFront(self.app))


class GunicornProxy:
    """The real command in a process of its own."""

    def __init__(self, process: ProxyProcess) -> None:
        self.process = process

    def client(self) -> McpClient:
        return McpClient(HttpFront(self.process.base))


@contextlib.contextmanager
def running(
    way: str, command: Sequence[str] = SCRIPTED, **settings: Any
) -> Iterator[WsgiProxy | GunicornProxy]:
    """A proxy with `settings`, started in `way`: `wsgi` or `gunicorn`."""
    if way == "wsgi":
        app = create_app(configured(command, **settings))
        try:
            yield WsgiProxy(app)
        finally:
            app.close()
    else:
        with ProxyProcess(command, options=as_options(settings)) as process:
            yield GunicornProxy(process)


def configured(command: Sequence[str] = SCRIPTED, **settings: Any) -> ProxyConfig:
    """A checked configuration."""
    return msgspec.structs.replace(from_values(settings), command=tuple(command))


def as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    options: list[str] = []
    for name, value in settings.items():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            options += [f"--{name.replace('_', '-')}", str(item)]
    return options
