"""What gunicorn alone can do: an application that answers by itself, and one that forwards.

    python bare.py PORT CPU_AFFINITY [TARGET_URL]

Both run under the settings and hooks under which the proxy runs, and check nothing. The first picks
the id and the text out of a call and answers with them: no stdio proxy on gunicorn can be faster.
The second sends each request to the target with requests' adapter, which is what a transparent
proxy of werkzeug and requests is at the least.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import requests
from gunicorn.app.base import BaseApplication
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from werkzeug.wrappers import Request, Response

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

_PIECE = 64 * 1024


class BareAnswer:
    """Answers calls. It has a `replica`, as ours has, for the hooks that pin a worker."""

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


class BareForwarder:
    """Sends every request to the target, and its answer back in pieces."""

    def __init__(self, target: str) -> None:
        self.replica = Replica()
        self._target = target
        self._adapter = HTTPAdapter(pool_maxsize=64)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        prepared = requests.PreparedRequest()  # by hand: `prepare` is slower
        prepared.method, prepared.url = request.method, self._target + request.full_path
        prepared.headers = CaseInsensitiveDict(headers)
        prepared.body = request.get_data()
        answer = self._adapter.send(prepared, stream=True)
        hop = ("connection", "transfer-encoding", "content-length")
        kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in hop]
        reply = Response(_pieces(answer), answer.status_code, kept)
        if "Content-Length" in answer.headers:
            reply.content_length = int(answer.headers["Content-Length"])
        return reply(environ, start_response)


def _pieces(answer: requests.Response) -> Iterator[bytes]:
    while piece := answer.raw.read(_PIECE):
        yield piece


class BareServer(BaseApplication):  # type: ignore[misc]
    """gunicorn, set as the proxy sets it."""

    def __init__(self, config: ProxyConfig, target: str | None) -> None:
        self._config = config
        self._target = target
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = gunicorn_settings(self._config)
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> WSGIApplication:
        return BareForwarder(self._target) if self._target else BareAnswer()


def main() -> None:
    """Serves until it is ended."""
    port, affinity, *target = sys.argv[1:]
    config = ProxyConfig(bind=f"127.0.0.1:{port}", cpu_affinity=affinity, log_level="warning")
    BareServer(config, target[0] if target else None).run()


if __name__ == "__main__":
    main()
