"""The cookies of a balancer that are kept, and when one is over (RFC 6265, sections 5.1.1, 5.3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire import cookies

NAMES = ["route*", "SERVERID"]
NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def kept(*received: str, before: str = "") -> str:
    """What is kept after an answer with these Set-Cookie headers."""
    return cookies.kept(before, [("Set-Cookie", value) for value in received], NAMES, NOW)


@pytest.mark.parametrize(
    "attributes",
    [
        "",
        "Path=/; HttpOnly; Secure",
        "Max-Age=05",
        "Max-Age=3600; Expires=Thu, 01 Jan 1970 00:00:00 GMT",  # Max-Age counts
        "Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=1",
        "Max-Age=0; Max-Age=1",  # the last one counts
        "Expires=Tue, 14 Nov 2023 22:13:21 GMT",
        "expires=Tuesday, 14-Nov-33 22:13:20 GMT",
        *("Max-Age=", "Max-Age", "Max-Age=soon", "Max-Age=0.5", "Expires", "Expires=never"),
        "Expires=Thu, 41 Jan 1970 00:00:00 GMT",
    ],
)
def test_a_cookie_is_kept(attributes: str) -> None:
    assert kept(f"route=new; {attributes}", before="a=b; route=old") == "a=b; route=new"


@pytest.mark.parametrize(
    "attributes",
    [
        *("Max-Age=0", "max-age = 000", "Max-Age=-1", "Max-Age=1; Max-Age=0"),
        "Max-Age=0; Expires=Fri, 01 Jan 2100 00:00:00 GMT",
        "Expires=Thu, 01 Jan 1970 00:00:00 GMT",
        "Path=/; expires=Thu, 01-Jan-1970 00:00:01 GMT; Secure",
        "Expires=Thursday, 01-Jan-70 00:00:00 GMT",
        "Expires=Thu Jan  1 00:00:00 1970",
        "Expires=Tue, 14 Nov 2023 22:13:20 GMT",
        "Max-Age=soon; Expires=Thu, 01 Jan 1970 00:00:00 GMT",
    ],
)
def test_one_that_is_over_is_taken_out(attributes: str) -> None:
    assert kept(f"route=; {attributes}", before="a=b; route=old") == "a=b"
    assert kept(f"route=; {attributes}", "route=again", before="route=old") == "route=again"


@given(st.text(max_size=40), st.text(max_size=40))
def test_nothing_breaks_the_reading(pair: str, attribute: str) -> None:
    for name in ("Expires", "Max-Age"):
        assert "other" not in kept(f"{pair}; {name}={attribute}", "other=1; Max-Age=9")


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("a=1", "a=1"),
        ("a=1; b=2", "a=1; b=2"),
        ("a=1,b=2, c=3,\td=4; e=5", "a=1; b=2; c=3; d=4; e=5"),
        ("a=1,2,b=3", "a=1,2; b=3"),
        ('a="1,b=2",c=3', 'a="1,b=2"; c=3'),
        ("a=1,b", "a=1,b"),
        ("a=1,", "a=1,"),
        ('a={"x":1,"y":2},b=3', 'a={"x":1,"y":2}; b=3'),
        ('a="1,b=2', 'a="1; b=2'),
    ],
)
def test_headers_that_a_server_joined_are_told_apart(told: str, meant: str) -> None:
    assert cookies.rejoined(told) == meant


def test_cookies_have_a_bound() -> None:
    found = kept(*(f"route{n}={'x' * 1500}" for n in range(9)))
    assert len(found) <= cookies.MAX_COOKIES
    assert found.startswith("route0=")
