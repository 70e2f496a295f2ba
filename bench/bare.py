"""What gunicorn alone can do: a WSGI application that answers a call by itself.

    python bare.py PORT CPU_AFFINITY

It runs under the settings and hooks that the proxy runs under. It reads the body, picks the id and
the text out of it and answers with them; no checks, no sessions, no server behind. No WSGI proxy
can be faster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from gunicorn.app.base import BaseApplication

from mcp_proxy.config import ProxyConfig
from mcp_proxy.replica import Replica
from mcp_proxy.server.gunicorn import gunicorn_settings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class _Arguments(msgspec.Struct):
    text: str = ""


class _Params(msgspec.Struct):
    arguments: _Arguments = msgspec.field(default_factory=_Arguments)


class _Call(msgspec.Struct):
    params: _Params = msgspec.field(default_factory=_Params)
    id: int | None = None


_call = msgspec.json.Decoder(_Call)

_ANSWER = '{"jsonrpc":"2.0","id":%d,"result":{"content":[{"type":"text","text":"%s"}]}}'


class BareAnswer:
    """The application. It has a `replica`, as ours has, for the hooks that pin a worker."""

    def __init__(self) -> None:
        self.replica = Replica()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        call = _call.decode(body) if body else _Call()
        if call.id is None:
            start_response("202 Accepted", [("Content-Length", "0")])
            return [b""]
        answer = (_ANSWER % (call.id, call.params.arguments.text)).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))]
        start_response("200 OK", headers)
        return [answer]


class BareServer(BaseApplication):  # type: ignore[misc]
    """gunicorn, set as the proxy sets it."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = gunicorn_settings(self._config)
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> WSGIApplication:
        return BareAnswer()


if __name__ == "__main__":
    BareServer(
        ProxyConfig(bind=f"127.0.0.1:{sys.argv[1]}", cpu_affinity=sys.argv[2], log_level="warning")
    ).run()
