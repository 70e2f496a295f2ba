"""Targets, addresses, and where a request goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire.urls import (
    RESOURCE_METADATA,
    Address,
    Target,
    is_endpoint,
    local_reference,
    own_path_in,
    parse_target,
    request_target,
)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", Target("http", "h", 80, "", "")),
        ("https://h", Target("https", "h", 443, "", "")),
        ("HTTP://H:81/Mcp?A=b,c", Target("http", "h", 81, "/Mcp", "A=b,c")),
        ("http://[::1]:8/x", Target("http", "::1", 8, "/x", "")),
        ("http://h:0/", Target("http", "h", 0, "/", "")),
        ("http://h/a#part", Target("http", "h", 80, "/a", "")),
        ("http://b\xfccher.example", Target("http", "xn--bcher-kva.example", 80, "", "")),
    ],
)
def test_an_absolute_url_is_a_target(url: str, expected: Target) -> None:
    assert parse_target(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "/",
            "h:1",
            "//h",
            "http:",
            "http:///x",
            "http://:80",
            "ftp://h",
            "file:///etc/passwd",
        ),
        *("http://h:x", "http://h:65536", "http://h:-1", "http://[", "http://[::1", "unix:/x"),
        *("http://u@h", "http://u:p@h", "http://@h", "javascript:alert(1)"),
        *("http://a b", "http://.h", "http://a..b", "http://a\x01", f"http://{'x' * 64}"),
    ],
)
def test_anything_else_is_none(url: str) -> None:
    assert parse_target(url) is None


@given(st.text(max_size=30))
def test_nothing_breaks_the_reading(text: str) -> None:
    for url in (text, f"http://{text}", f"http://h/{text}"):
        target = parse_target(url)
        assert target is None or target.host


@pytest.mark.parametrize(
    ("address", "url", "host"),
    [
        (Address("http", "h", 80), "http://h:80", "h"),
        (Address("https", "h", 443), "https://h:443", "h"),
        (Address("http", "h", 443), "http://h:443", "h:443"),
        (Address("http", "1.2.3.4", 80, "name"), "http://1.2.3.4:80", "name"),
        (Address("https", "::1", 8443, "name"), "https://[::1]:8443", "name:8443"),
        (Address("http", "::1", 80), "http://[::1]:80", "[::1]"),
    ],
)
def test_what_an_address_is_called(address: Address, url: str, host: str) -> None:
    assert address.url == address.backend_url == url
    assert address._replace(path="/x", query="y=z").backend_url == f"{url}/x"
    assert address.host_header == host
    target = parse_target(url)
    assert target is not None
    assert target.address == address._replace(name=None)


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("HTTP://H/Mcp?A=b,c#part", "http://h:80/Mcp?A=b,c"),
        ("https://[::1]:8", "https://[::1]:8"),
    ],
)
def test_a_target_in_one_string(url: str, whole: str) -> None:
    target = parse_target(url)
    assert target is not None
    assert target.url == whole
    assert parse_target(target.url) == target
    assert target.origin == (target.scheme, target.host, target.port)


def at(backend: str | None) -> Address | None:
    """The address that a `backend_url` names."""
    named = parse_target(backend or "")
    return None if named is None else Address(*named.origin, None, named.own_path, named.query)


@pytest.mark.parametrize(
    ("static", "backend", "path", "query", "expected"),
    [
        ("http://h:1", None, "/mcp", "", "/mcp"),
        ("http://h:1/", None, "/x", "", "/x"),
        ("http://h:1/", None, "", "", "/mcp"),
        ("http://h:1/", None, "/mcp/", "", "/mcp/"),
        ("http://h:1/mcp", None, "/mcp", "", "/mcp"),
        ("http://h:1/mcp", None, "/.well-known/y", "a=1", "/.well-known/y?a=1"),
        ("https://h/v2/mcp?t=a,b", None, "/mcp", "c=1", "/v2/mcp?t=a,b&c=1"),
        ("https://h/v2/mcp?t=a,b", None, "/mcp", "", "/v2/mcp?t=a,b"),
        ("https://h/v2/mcp?t=a,b", None, "/other", "c=1", "/other?c=1"),
        ("http://h:1", "http://k:2", "/mcp", "c=1", "/mcp?c=1"),
        ("http://h:1/v2?q=1", "http://k:2/", "/mcp", "c=1", "/v2?q=1&c=1"),
        ("http://h:1", "http://k:2/z", "/mcp", "c=1", "/z?c=1"),
        ("http://h:1/v2?t=1", "http://k:2/z?u=1", "/mcp", "c=1", "/z?u=1&c=1"),
        ("http://h:1/v2?t=1", "http://k:2/z", "/mcp", "", "/z"),
        ("http://h:1/v2?t=1", "http://k:2?u=1", "/mcp", "", "/v2?u=1"),
        ("http://h:1/v2", "http://k:2/z", "/x", "c=1", "/x?c=1"),
        ("http://h:1", None, f"{RESOURCE_METADATA}/mcp", "", f"{RESOURCE_METADATA}/mcp"),
        ("http://h:1/v2?t=1", None, f"{RESOURCE_METADATA}/mcp", "", f"{RESOURCE_METADATA}/v2?t=1"),
        ("http://h:1/v2", "http://k:2/z", f"{RESOURCE_METADATA}/mcp", "", f"{RESOURCE_METADATA}/z"),
        ("http://h:1/v2", None, RESOURCE_METADATA, "", RESOURCE_METADATA),
        ("http://h:1/v2", None, f"{RESOURCE_METADATA}/v2", "", f"{RESOURCE_METADATA}/v2"),
    ],
)
def test_where_a_request_goes(
    static: str, backend: str | None, path: str, query: str, expected: str
) -> None:
    target = parse_target(static)
    assert target is not None
    assert request_target(target, at(backend), path, query) == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("/x?y#z", "/m/x?y#z"),
        ("x", "x"),
        ("", ""),
        ("?a", "?a"),
        ("http://10.0.0.1:81/x?y#z", "/m/x?y#z"),
        ("http://Name:81", "/m/"),
        ("http://name:81?q", "/m/?q"),
        ("https://name:81/x", "/m/x"),
        ("//name:81//x", "/m//x"),
        ("https://PUBLIC:8/x", "/m/x"),
        ("http://public/x", "http://public/x"),
        ("http://name/x", "http://name/x"),
        ("https://name/x", "https://name/x"),
        ("http://other:81/x", "http://other:81/x"),
        ("//other/x", "//other/x"),
        ("mailto:name", "mailto:name"),
        ("http://[", "http://["),
    ],
)
def test_what_a_server_names_is_named_by_the_proxy(reference: str, expected: str) -> None:
    address = Address("http", "10.0.0.1", 81, "name")
    assert local_reference(address, "public:8", reference, "/m") == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://10.0.0.1:81/x?y", "/x?y"),
        ("http://name:81", ""),
        ("https://public:8/", "/"),
        ("http://other:81/x", None),
        ("http://name/x", None),
        ("/x", None),
        ("http://[", None),
    ],
)
def test_what_a_url_of_the_server_itself_has_behind_its_host(
    url: str, expected: str | None
) -> None:
    assert own_path_in(url, Address("http", "10.0.0.1", 81, "name"), "public:8") == expected


def test_a_path_at_the_root_never_names_a_host() -> None:
    assert local_reference(Address("http", "a", 81), "a:81", "http://a:81//b/c", "") == "/.//b/c"


@pytest.mark.parametrize(
    ("static", "backend", "path", "expected"),
    [
        ("http://h", None, "/mcp", True),
        ("http://h", None, "/mcp/", True),
        ("http://h", None, "/", False),
        ("http://h/v2", None, "/", True),
        ("http://h", "http://k/z", "", True),
        ("http://h/v2", None, "/v2", False),
        ("http://h/v2", None, "/login", False),
    ],
)
def test_which_path_is_the_endpoint(
    static: str, backend: str | None, path: str, expected: bool
) -> None:
    there = parse_target(static)
    assert there is not None
    assert is_endpoint(there, at(backend), path) is expected
