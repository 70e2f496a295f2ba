"""Which headers go to a backend, and which come back."""

from __future__ import annotations

from typing import Any

import pytest

from mcp_proxy.edge.forwarded import HeaderPolicy, is_trusted_peer, raw_path
from mcp_proxy.wire.headers import HOP_BY_HOP


def environ(**fields: str) -> dict[str, Any]:
    base = {"REMOTE_ADDR": "9.9.9.9", "HTTP_HOST": "front:80", "wsgi.url_scheme": "https"}
    return {**base, **fields}


def sent(policy: HeaderPolicy, **fields: str) -> dict[str, str]:
    found = policy.outbound(environ(**fields))
    assert len({name.lower() for name in found}) == len(found)
    return found


def test_end_to_end_headers_pass() -> None:
    found = sent(
        HeaderPolicy(),
        HTTP_AUTHORIZATION="Bearer x",
        HTTP_MCP_PARAM_A="1",
        HTTP_TRACEPARENT="00-1",
        HTTP_MCP_SESSION_ID="s",
        CONTENT_TYPE="application/json",
        CONTENT_LENGTH="5",
    )
    assert found == {
        "Authorization": "Bearer x",
        "Mcp-Param-A": "1",
        "Traceparent": "00-1",
        "Mcp-Session-Id": "s",
        "Content-Type": "application/json",
        "X-Forwarded-For": "9.9.9.9",
        "X-Forwarded-Host": "front:80",
        "X-Forwarded-Proto": "https",
    }


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP))
def test_headers_of_the_connection_stay(name: str) -> None:
    key = "HTTP_" + name.upper().replace("-", "_")
    assert name.title() not in sent(HeaderPolicy(), **{key: "x"})
    assert HeaderPolicy().inbound([(name.upper(), "x"), ("A", "1")]) == [("A", "1")]


def test_headers_that_connection_names_stay() -> None:
    assert "X-Hop" not in sent(HeaderPolicy(), HTTP_CONNECTION="close, x-hop", HTTP_X_HOP="1")
    named = [("connection", "close, X-One ,"), ("Connection", "x-two")]
    others = [("X-ONE", "1"), ("x-Two", "2"), ("Close", "3"), ("X-Three", "4")]
    assert HeaderPolicy().inbound(named + others) == [("X-Three", "4")]
    assert HeaderPolicy().inbound(others + named) == [("X-Three", "4")]


FORWARDED = {
    "HTTP_X_FORWARDED_FOR": "1.1.1.1, 2.2.2.2",
    "HTTP_X_FORWARDED_HOST": "public",
    "HTTP_X_FORWARDED_PROTO": "http",
    "HTTP_X_FORWARDED_PREFIX": "/p",
    "HTTP_FORWARDED": "for=1.1.1.1",
}


def test_strangers_are_not_believed() -> None:
    found = sent(HeaderPolicy(("8.8.8.8",)), **FORWARDED)
    assert found == {
        "X-Forwarded-For": "9.9.9.9",
        "X-Forwarded-Host": "front:80",
        "X-Forwarded-Proto": "https",
    }


@pytest.mark.parametrize("trusted", ["9.9.9.9", "*"])
def test_a_trusted_proxy_is_continued(trusted: str) -> None:
    found = sent(HeaderPolicy((trusted,)), **FORWARDED)
    assert found == {
        "X-Forwarded-For": "1.1.1.1, 2.2.2.2, 9.9.9.9",
        "X-Forwarded-Host": "public",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Prefix": "/p",
        "Forwarded": "for=1.1.1.1",
    }


def test_what_connection_names_is_no_word_of_a_trusted_proxy() -> None:
    found = sent(HeaderPolicy(("*",)), HTTP_CONNECTION="x-forwarded-for", **FORWARDED)
    assert found["X-Forwarded-For"] == "9.9.9.9"


def test_a_peer_without_an_address_adds_none() -> None:
    assert "X-Forwarded-For" not in sent(HeaderPolicy(), REMOTE_ADDR="")
    found = sent(HeaderPolicy(("*",)), REMOTE_ADDR="", **FORWARDED)
    assert found["X-Forwarded-For"] == "1.1.1.1, 2.2.2.2"


@pytest.mark.parametrize(
    ("chain", "expected"), [("1.1.1.1,", "1.1.1.1, 9.9.9.9"), (", ", "9.9.9.9")]
)
def test_a_chain_that_ends_in_a_comma_is_continued(chain: str, expected: str) -> None:
    found = sent(HeaderPolicy(("*",)), HTTP_X_FORWARDED_FOR=chain)
    assert found["X-Forwarded-For"] == expected


def test_changes_set_and_remove() -> None:
    policy = HeaderPolicy((), ("X-Set: a: b", "authorization:", "X-Forwarded-For: hidden"))
    found = sent(policy, HTTP_AUTHORIZATION="Bearer x", HTTP_X_SET="client")
    assert found["X-Set"] == "a: b"
    assert found["X-Forwarded-For"] == "hidden"
    assert "Authorization" not in found


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Host", "x-forwarded-proto"])
def test_what_we_say_ourselves_can_be_removed(name: str) -> None:
    found = sent(HeaderPolicy((), (f"{name}:",)))
    assert name.lower() not in {known.lower() for known in found}


def test_answers_keep_what_is_the_backends() -> None:
    given = [
        ("Set-Cookie", "a"),
        ("Set-Cookie", "b"),
        ("Content-Length", "5"),
        ("WWW-Authenticate", "x"),
    ]
    assert HeaderPolicy().inbound([*given, ("Date", "x"), ("SERVER", "y")]) == given


def test_a_client_sees_its_own_session_id_and_no_other() -> None:
    given = [("A", "1"), ("mcp-session-id", "theirs"), ("B", "2")]
    assert HeaderPolicy().inbound(given) == given
    found = HeaderPolicy().inbound(given, "ours")
    assert found == [("A", "1"), ("mcp-session-id", "ours"), ("B", "2")]


@pytest.mark.parametrize("value", ["a\r\n b", "a\n\tb", "a\r\n \r\n  b"])
def test_a_folded_line_becomes_one(value: str) -> None:
    assert HeaderPolicy().inbound([("A", value)]) == [("A", "a b")]


@pytest.mark.parametrize(
    "malformed",
    [("A", "a\x01"), ("A", "a\0b"), ("A", "a\rb"), ("A", "a\nB: c"), ("A", "a\x7f"), ("A b", "c")],
)
def test_what_no_server_would_send_is_left_out(malformed: tuple[str, str]) -> None:
    kept = [("B", "\xe9\t1"), ("C", "")]
    assert HeaderPolicy().inbound([malformed, *kept]) == kept


def test_a_length_beside_a_transfer_encoding_is_dropped() -> None:
    given = [("Content-Length", "5"), ("transfer-encoding", "chunked"), ("A", "1")]
    assert HeaderPolicy().inbound(given) == [("A", "1")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"PATH_INFO": "/a b/ü".encode().decode("latin-1")}, "/a%20b/%C3%BC"),
        ({"PATH_INFO": "/a%b?c#d"}, "/a%25b%3Fc%23d"),
        ({"PATH_INFO": "/a/b", "RAW_URI": "/a%2Fb?q=1"}, "/a%2Fb"),
        ({"PATH_INFO": "/a/b", "REQUEST_URI": "/a%2fb"}, "/a%2fb"),
        ({"PATH_INFO": "/b c", "SCRIPT_NAME": "/a", "RAW_URI": "/a/b%20c"}, "/b%20c"),
        ({"PATH_INFO": "/a", "RAW_URI": "http://host/a?x"}, "/a"),
        ({"PATH_INFO": ""}, ""),
        ({"PATH_INFO": "/x;y=1,2/@:~"}, "/x;y=1,2/@:~"),
    ],
)
def test_the_path_as_the_client_wrote_it(fields: dict[str, str], expected: str) -> None:
    assert raw_path(environ(**fields)) == expected


@pytest.mark.parametrize(
    ("peer", "trusted", "expected"),
    [
        ("10.1.2.3", ("10.0.0.0/8",), True),
        ("10.1.2.3", ("10.9.9.9/8",), True),
        ("11.1.2.3", ("10.0.0.0/8", "::1"), False),
        ("::ffff:10.1.2.3", ("10.0.0.0/8",), True),
        ("::ffff:10.1.2.3", ("10.1.2.3",), True),
        ("10.1.2.3", ("::ffff:10.1.2.3",), False),
        ("0:0:0:0:0:0:0:1", ("::1",), True),
        ("fd00::7", ("fd00::/8",), True),
        ("", ("10.0.0.0/8",), False),
        ("", ("*",), True),
        ("anything", ("*",), True),
        ("a name", ("10.0.0.0/8",), False),
        ("10.1.2.3", (), False),
    ],
)
def test_who_is_believed(peer: str, trusted: tuple[str, ...], expected: bool) -> None:
    assert is_trusted_peer({"REMOTE_ADDR": peer}, trusted) is expected
