"""The proxies that are measured beside each other, and how each is started.

Behind those of `STDIO` is the same stdio server, behind those of `HTTP` the same HTTP server.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from measuring import HERE
from processes import (
    ECHO,
    MODERN_ECHO,
    Command,
    Process,
    nginx,
    nginx_before,
    node,
    ours,
    redis_server,
    running,
)

#: Where `bench/peers` installs the other proxies.
NODE_PEERS = HERE / "node" / "node_modules"
PYTHON_PEER = HERE / ".venv-mcp-proxy" / "bin" / "mcp-proxy"


class Contender(NamedTuple):
    """`command` makes the command line for the URL of an HTTP server; without it there is no proxy.

    `program` is what somebody else's proxy needs. With `has_redis` our proxy is told the URL of one
    of its own. `is_modern` says what the calls are, `has_modern_server` what the server behind
    speaks.
    """

    name: str
    title: str
    command: Callable[[str], Command] | None
    kind: Literal["ours", "peer", "bound"] = "ours"
    program: Path | None = None
    has_redis: bool = False
    is_behind_nginx: bool = False
    is_modern: bool = False
    has_modern_server: bool = False

    @property
    def missing(self) -> str | None:
        """What it needs and cannot be found."""
        if self.program is not None and not self.program.exists():
            return "not installed (bench/peers)"
        if self.program is not None and self.program.suffix != "" and node() is None:
            return "there is no node"
        return "there is no nginx" if self.is_behind_nginx and nginx() is None else None


class Started(NamedTuple):
    """A contender that runs: where it is called, the proxy and the Redis, if it has any."""

    port: int
    proxy: Process | None
    redis: Process | None


@contextlib.contextmanager
def started(contender: Contender, server: Process | None = None) -> Iterator[Started]:
    """A contender that listens, with what it needs; `server` is the HTTP server behind it."""
    port = 0 if server is None else server.port
    proxy = redis = None
    with contextlib.ExitStack() as stack:
        if contender.has_redis:
            redis = stack.enter_context(redis_server())
        if contender.command is not None:
            command = contender.command(f"http://127.0.0.1:{port}")
            proxy = stack.enter_context(running(contender.name, command, redis))
            port = proxy.port
        if contender.is_behind_nginx:
            port = stack.enter_context(nginx_before(port)).port
        yield Started(port, proxy, redis)


def _stdio(*options: str, server: tuple[str, ...] = ECHO) -> Callable[[str], Command]:
    return lambda target: ours(*options, behind=server)


def _http(*options: str) -> Callable[[str], Command]:
    return lambda target: ours("--target-url", target, *options)


def _bare_answer(affinity: str) -> Callable[[str], Command]:
    return lambda target: lambda port: _bare(port, affinity)


def _bare_forwarder(target: str) -> Command:
    return lambda port: _bare(port, "auto", target)


def _bare(port: int, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / "bare.py"), str(port), *arguments]


_MCP_PROXY = NODE_PEERS / "mcp-proxy/dist/bin/mcp-proxy.mjs"
_SUPERGATEWAY = NODE_PEERS / "supergateway/dist/index.js"


def _mcp_proxy(*more: str) -> Callable[[str], Command]:
    def command(port: int) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(port), "--server", "stream", *more]
        return [str(node()), str(_MCP_PROXY), *options, "--", *ECHO]

    return lambda target: command


def _supergateway(*more: str) -> Callable[[str], Command]:
    def command(port: int) -> list[str]:
        options = ["--outputTransport", "streamableHttp", "--port", str(port), *more]
        options += ["--logLevel", "none", "--streamableHttpPath", "/mcp"]
        return [str(node()), str(_SUPERGATEWAY), "--stdio", shlex.join(ECHO), *options]

    return lambda target: command


def _python_mcp_proxy(target: str) -> Command:
    options = ["--host", "127.0.0.1", "--log-level", "ERROR"]
    return lambda port: [str(PYTHON_PEER), *options, "--port", str(port), "--", *ECHO]


_TWO, _FOUR = ("--workers", "2"), ("--workers", "4")
_RELAYED = ("--passing", "off")
_GEVENT = ("--worker-class", "gevent")

STDIO = (
    Contender("ours", "1 worker, memory", _stdio()),
    Contender("ours-free", "1 worker on all CPUs, memory", _stdio("--cpu-affinity", "off")),
    Contender("redis", "1 worker, Redis", _stdio(), has_redis=True),
    Contender("memory-2", "2 workers, memory", _stdio(*_TWO)),
    Contender("memory-4", "4 workers, memory", _stdio(*_FOUR)),
    Contender("redis-2", "2 workers, Redis", _stdio(*_TWO), has_redis=True),
    Contender("redis-4", "4 workers, Redis", _stdio(*_FOUR), has_redis=True),
    Contender(
        "relayed-2", "2 workers, Redis, passing off", _stdio(*_TWO, *_RELAYED), has_redis=True
    ),
    Contender(
        "relayed-4", "4 workers, Redis, passing off", _stdio(*_FOUR, *_RELAYED), has_redis=True
    ),
    Contender("gevent", "1 gevent worker, memory", _stdio(*_GEVENT)),
    Contender("gevent-2", "2 gevent workers, Redis", _stdio(*_GEVENT, *_TWO), has_redis=True),
    Contender(
        "modern",
        "1 worker, memory, modern calls and server",
        _stdio(server=MODERN_ECHO),
        is_modern=True,
    ),
    Contender("bridged", "1 worker, memory, modern calls, bridged", _stdio(), is_modern=True),
    Contender(
        "modern-2",
        "2 workers, Redis, modern calls and server",
        _stdio(*_TWO, server=MODERN_ECHO),
        has_redis=True,
        is_modern=True,
    ),
    Contender(
        "bridged-2",
        "2 workers, Redis, modern calls, bridged",
        _stdio(*_TWO),
        has_redis=True,
        is_modern=True,
    ),
    Contender("nginx", "nginx, 1 worker, memory", _stdio(), is_behind_nginx=True),
    Contender(
        "nginx-2", "nginx, 2 workers, Redis", _stdio(*_TWO), has_redis=True, is_behind_nginx=True
    ),
    Contender(
        "nginx-relayed-2",
        "nginx, 2 workers, Redis, passing off",
        _stdio(*_TWO, *_RELAYED),
        has_redis=True,
        is_behind_nginx=True,
    ),
    Contender("mcp-proxy", "npm mcp-proxy", _mcp_proxy(), "peer", _MCP_PROXY),
    Contender(
        "mcp-proxy-lean",
        "npm mcp-proxy without its event store",
        _mcp_proxy("--no-eventStore"),
        "peer",
        _MCP_PROXY,
    ),
    Contender(
        "supergateway",
        "npm supergateway, stateful",
        _supergateway("--stateful"),
        "peer",
        _SUPERGATEWAY,
    ),
    Contender(
        "supergateway-process",
        "npm supergateway, a process a request",
        _supergateway(),
        "peer",
        _SUPERGATEWAY,
    ),
    Contender("python-mcp-proxy", "PyPI mcp-proxy", _python_mcp_proxy, "peer", PYTHON_PEER),
    Contender("bare", "bare WSGI answer", _bare_answer("auto"), "bound"),
    Contender("bare-free", "bare WSGI answer on all CPUs", _bare_answer("off"), "bound"),
)

HTTP = (
    Contender("ours", "1 worker, memory", _http()),
    Contender("redis", "1 worker, Redis", _http(), has_redis=True),
    Contender("redis-2", "2 workers, Redis", _http(*_TWO), has_redis=True),
    Contender("redis-4", "4 workers, Redis", _http(*_FOUR), has_redis=True),
    Contender("gevent", "1 gevent worker, memory", _http(*_GEVENT)),
    Contender(
        "modern",
        "1 worker, memory, modern calls and server",
        _http(),
        is_modern=True,
        has_modern_server=True,
    ),
    Contender(
        "modern-redis",
        "1 worker, Redis, modern calls and server",
        _http(),
        has_redis=True,
        is_modern=True,
        has_modern_server=True,
    ),
    Contender("bridged", "1 worker, memory, modern calls, bridged", _http(), is_modern=True),
    Contender(
        "bridged-legacy",
        "1 worker, memory, modern server, bridged",
        _http(),
        has_modern_server=True,
    ),
    Contender("nginx-ours", "nginx, 1 worker, memory", _http(), is_behind_nginx=True),
    Contender("bare", "bare forwarder of werkzeug and requests", _bare_forwarder, "bound"),
    Contender("nginx", "nginx alone", None, "bound", is_behind_nginx=True),
    Contender("server", "the HTTP server alone", None, "bound"),
)
