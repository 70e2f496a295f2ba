"""The command `mcp-wsgi-proxy ctl`: what an operator asks of a proxy that runs, and tells it.

It talks to `ctl_socket`, which the proxy's user alone can open.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.logs import visible
from mcp_proxy.errors import ConfigError

# Seconds for an answer, for all workers to have done what they were told, and to have said what
# they do.
_ANSWERED = 10.0
_DONE = 15.0
_WRITTEN = 3.0

_POLL = 0.1

_DID = {
    "end": "the session is ended",
    "restart": "the server's processes are replaced, each as soon as no call needs it",
    "reload": "all workers serve what is in the file of servers",
}
_UNKNOWN = {"end": "no such session", "restart": "no such server"}
_FAILED = {
    "end": "the session could not be ended",
    "restart": "nothing is restarted",
    "reload": "the file of servers is not served as it is",
}
_PENDING = "not all workers have done it in time"


def ctl(config: ProxyConfig, word: str, about: str = "") -> int:
    """Does what the command says and prints what came of it; the exit code.

    Raises ConfigError where the proxy cannot be reached.
    """
    if config.ctl_socket is None:
        raise ConfigError("ctl needs the setting ctl_socket, as the proxy has it")
    proxy = _Proxy(config.ctl_socket)
    if word == "status":
        told = _status(proxy, about)
        _show(told)
        return 1 if about and not told.get("asked", {}).get("session") else 0
    return _order(proxy, word, about)


def key_uses(path: str) -> Mapping[str, float]:
    """When the API keys of the proxy at that socket were last used, by their digests.

    Raises ConfigError where it cannot be reached.
    """
    uses: Mapping[str, float] = _Proxy(path).ask("GET", "/keys")
    return uses


def _order(proxy: _Proxy, word: str, about: str) -> int:
    """Tells all workers to do something, waits for that, and prints what came of it."""
    query = urlencode({"task": word, "about": about})
    order = proxy.ask("POST", f"/orders?{query}")["order"]
    until, result = time.monotonic() + _DONE, {"outcome": "pending"}
    while result["outcome"] == "pending" and time.monotonic() < until:
        time.sleep(_POLL)
        result = proxy.ask("GET", f"/orders?order={order}")
    match result["outcome"]:
        case "ended" | "done":
            print(_DID[word])
            return 0
        case "unknown":
            print(_UNKNOWN[word])
        case "failed":
            _line(f"{_FAILED[word]}: {result['reason']}")
        case _:
            print(_PENDING)
    return 1


def _status(proxy: _Proxy, session_id: str) -> Any:
    """What goes on, as all workers say, or as many as do in time; of a session, if it is named."""
    until = time.monotonic() + _WRITTEN
    while True:
        told = proxy.ask("GET", "/status", {"Mcp-Session-Id": session_id})
        is_complete = not told["silent"] and told.get("asked", {}).get("outcome") != "pending"
        if is_complete or time.monotonic() > until:
            return told
        time.sleep(_POLL)


class _Proxy:
    """The proxy that listens at a unix socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def ask(self, method: str, target: str, headers: Mapping[str, str] = {}) -> Any:
        """What it answers; raises ConfigError where that is nothing of use."""
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, target, headers={"Content-Length": "0", **headers})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status >= 300:
                raise ConfigError(f"the proxy answered {answer.status}: {body.decode()}")
            return json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ConfigError(f"no proxy answers at {self._path}: {error}") from error
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWERED)
        self._path = path

    def connect(self) -> None:
        """Connects to the path instead of a host and a port."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _show(told: Any) -> None:
    """Prints what goes on, a line for each thing; what others say of themselves cannot hide any.

    Of a session that was asked for that alone is printed.
    """
    now = told["now"]
    if (asked := told.get("asked")) is not None:
        if asked["session"]:
            _show_session(asked["session"], now)
        else:
            sentences = {"pending": _PENDING, "unknown": _UNKNOWN["end"]}
            _line(sentences.get(asked["outcome"], asked["reason"]))
        return
    for each in told["servers"]:
        reason = f": {each['reason']}" if each["reason"] else ""
        _line(f"server  {each['name']}  {each['state']}{reason}  calls={each['calls']:.0f}")
    for each in told["workers"]:
        _line(
            f"worker  {each['host']}/{each['worker']}  {each['health']}  pid={each['pid']} "
            f"sessions={each['sessions']:.0f} streams={each['streams']:.0f} "
            f"children={each['children']:.0f}"
        )
    for each in told["sessions"]:
        _show_session(each, now)
    for each in told["failures"]:
        _line(f"failure {each['server']}  {now - each['at']:.0f} s ago: {each['reason']}")
        for line in each["stderr"]:
            _line(f"        {line}")


def _show_session(session: Any, now: float) -> None:
    where = f"at {session['backend']}  " if session["backend"] else ""
    _line(
        f"session ...{session['id']}  {session['server']}  {session['client']}  {where}"
        f"began {now - session['began']:.0f} s ago  calls={session['calls']} "
        f"used {now - session['last']:.0f} s ago  {session['error']}"
    )


def _line(text: str) -> None:
    print(visible(text).rstrip())
