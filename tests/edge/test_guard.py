"""Origin and Host: who may come in."""

from __future__ import annotations

from contextlib import closing

import pytest
from werkzeug.test import Client

from mcp_proxy import ProxyConfig, create_app
from mcp_proxy.edge.guard import Guard, is_loopback
from mcp_proxy.errors import Forbidden


def environ(host: str | None, server: str = "127.0.0.1", **more: str) -> dict[str, str]:
    headers = {"HTTP_HOST": host} if host is not None else {}
    return {"SERVER_NAME": server, **headers, **more}


LOCAL = [
    "localhost",
    "localhost:8080",
    "127.0.0.1",
    "127.9.9.9:1",
    "[::1]",
    "[::1]:80",
    "a.localhost",
]
FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:80",
    "10.0.0.1",
    "",
    "[",
]


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_names_are_served_on_a_loopback_socket(host: str) -> None:
    Guard().check(environ(host))


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_not_served_on_a_loopback_socket(host: str) -> None:
    with pytest.raises(Forbidden):
        Guard().check(environ(host))


@pytest.mark.parametrize("server", ["0.0.0.0", "10.1.2.3", "proxy.example"])
def test_elsewhere_any_name_is_served(server: str) -> None:
    Guard().check(environ("proxy.example", server))


def test_a_request_without_host_is_served() -> None:
    Guard().check(environ(None))


def test_named_hosts_are_the_only_ones() -> None:
    guard = Guard(hosts=("proxy.example", "other.example:8443"))
    for host in ("proxy.example", "proxy.example:80", "other.example:8443"):
        guard.check(environ(host, "0.0.0.0"))
    for host in ("localhost", "other.example", "other.example:1"):
        with pytest.raises(Forbidden):
            guard.check(environ(host, "0.0.0.0"))


def test_a_star_is_everybody() -> None:
    Guard(("*",), ("*",)).check(environ("evil.example", HTTP_ORIGIN="http://evil.example"))


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "http://localhost.evil.example", "http://[", "", "x"]
)
def test_foreign_origins_are_refused_on_every_socket(origin: str) -> None:
    for server in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(Forbidden):
            Guard().check(environ("localhost", server, HTTP_ORIGIN=origin))


@pytest.mark.parametrize("origin", ["http://localhost/\x01", "http://localhost/\xe9", "\x7f"])
@pytest.mark.parametrize("origins", [None, ("*",)])
def test_an_origin_that_cannot_be_echoed_is_refused(
    origin: str, origins: tuple[str, ...] | None
) -> None:
    with pytest.raises(Forbidden):
        Guard(origins).check(environ("localhost", HTTP_ORIGIN=origin))


def test_named_origins_are_the_only_ones() -> None:
    guard = Guard(origins=("https://app.example",))
    guard.check(environ("localhost", HTTP_ORIGIN="https://app.example"))
    for origin in ("http://app.example", "https://app.example:8443", "http://localhost"):
        with pytest.raises(Forbidden):
            guard.check(environ("localhost", HTTP_ORIGIN=origin))


def test_a_page_on_a_named_host_is_at_home() -> None:
    guard = Guard(hosts=("proxy.example",))
    guard.check(environ("proxy.example", HTTP_ORIGIN="https://proxy.example"))


def test_cors_names_the_origin_and_only_an_allowed_one() -> None:
    allowed = dict(Guard().cors_headers(environ(None, HTTP_ORIGIN="http://localhost:1")))
    assert allowed["Access-Control-Allow-Origin"] == "http://localhost:1"
    assert allowed["Vary"] == "Origin"
    assert Guard().cors_headers(environ(None, HTTP_ORIGIN="http://evil.example")) == []
    assert Guard().cors_headers(environ(None)) == []


def preflight(**more: str) -> dict[str, str]:
    """The answer to a preflight of an allowed page."""
    asked = {f"HTTP_ACCESS_CONTROL_REQUEST_{name}": value for name, value in more.items()}
    origin = {"HTTP_ORIGIN": "http://localhost:1", "REQUEST_METHOD": "OPTIONS"}
    given = Guard().cors_headers(environ(None, **origin, **asked))
    assert len(dict(given)) == len(given)
    return dict(given)


def test_a_preflight_is_granted_what_it_asks_for() -> None:
    found = preflight(METHOD="PATCH", HEADERS="x-api-key, traceparent,Mcp-Param-City")
    assert found["Access-Control-Allow-Headers"] == "x-api-key, traceparent, Mcp-Param-City"
    assert found["Access-Control-Allow-Methods"] == "GET, POST, DELETE, OPTIONS, PATCH"
    assert found["Access-Control-Allow-Origin"] == "http://localhost:1"


def test_a_preflight_that_asks_for_nothing_is_told_what_clients_use() -> None:
    found = preflight(METHOD="POST")
    assert found["Access-Control-Allow-Methods"] == "GET, POST, DELETE, OPTIONS"
    assert "Mcp-Session-Id" in found["Access-Control-Allow-Headers"]


@pytest.mark.parametrize("name", ["a b", "x\r\nSet-Cookie: a", "\u00e4", "a:b", "", "(", "a;b"])
def test_only_names_are_granted(name: str) -> None:
    found = preflight(METHOD=name, HEADERS=f"x-one,{name}, x-two")
    assert found["Access-Control-Allow-Headers"] == "x-one, x-two"
    assert found["Access-Control-Allow-Methods"] == "GET, POST, DELETE, OPTIONS"


def test_other_requests_and_other_pages_are_granted_nothing() -> None:
    asked = {"HTTP_ACCESS_CONTROL_REQUEST_HEADERS": "x-a", "HTTP_ORIGIN": "http://localhost:1"}
    assert "Access-Control-Allow-Headers" not in dict(Guard().cors_headers(environ(None, **asked)))
    asked |= {"HTTP_ORIGIN": "http://evil.example", "REQUEST_METHOD": "OPTIONS"}
    assert Guard().cors_headers(environ(None, **asked)) == []


@pytest.mark.parametrize(("name", "expected"), [("::1", True), ("0.0.0.0", False), ("x y", False)])
def test_loopback_addresses(name: str, expected: bool) -> None:
    assert is_loopback(name) is expected


@pytest.mark.parametrize(("peer", "served"), [("127.0.0.1", False), ("10.0.0.9", True)])
def test_a_server_that_does_not_say_where_it_listens_is_judged_by_its_peer(
    peer: str, served: bool
) -> None:
    asked = environ("proxy.example", "waitress.invalid", REMOTE_ADDR=peer)
    if served:
        Guard().check(asked)
    else:
        with pytest.raises(Forbidden):
            Guard().check(asked)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/sse"), ("GET", "/mcp"), ("POST", "/mcp")])
def test_an_image_of_another_site_begins_nothing(site: str, method: str, path: str) -> None:
    with closing(create_app(ProxyConfig(command=("/no/such/server",)))) as app:
        headers = {"Sec-Fetch-Site": site, "Accept": "text/event-stream"}
        answer = Client(app).open(path, method=method, headers=headers)
        assert (answer.status_code, answer.json["error"]["code"]) == (403, -32600)
        own = Client(app).open(path, method=method, headers={**headers, "Sec-Fetch-Site": "none"})
        assert own.status_code != 403


def test_only_the_mcp_endpoints_of_an_http_server_ask_for_the_site() -> None:
    with closing(create_app(ProxyConfig(target_url=("http://127.0.0.1:1",)))) as app:
        headers = {"Sec-Fetch-Site": "cross-site"}
        found = {p: Client(app).get(p, headers=headers).status_code for p in _PATHS_OF_HTTP}
    assert found == _PATHS_OF_HTTP


_PATHS_OF_HTTP = {"/mcp": 403, "/sse": 403, "/messages/": 403, "/authorize": 502, "/": 502}
