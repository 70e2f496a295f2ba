"""The endpoint event of HTTP+SSE streams: found, rewritten, and nothing else touched."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_proxy.wire import sse
from mcp_proxy.wire.endpoint_event import (
    MAX_EVENT,
    OUR_PARAMETER,
    EndpointRewriter,
    Named,
    local_uri,
    named_session,
    with_session,
)

BOM = b"\xef\xbb\xbf"
ENDS = [b"\n", b"\r\n", b"\r"]

#: What is no event, and may stand before the first.
HEADS = [
    b"",
    BOM,
    b"\n\r\n",
    b": hi\n\n",
    BOM + b":\r:\r\r",
    b"retry: 9\n\n",
    b"id: 7\r\n\r\nevent: x\r\r",
]

Cut = Callable[[bytes], list[bytes]]


def passed(pieces: list[bytes], *, new: str = "/new") -> tuple[bytes, list[str]]:
    """What leaves a rewriter, whole, and the URIs that it was asked for."""
    asked: list[str] = []

    def rewrite(uri: str) -> str:
        asked.append(uri)
        return new

    rewriter = EndpointRewriter(rewrite)
    return b"".join(rewriter.feed(piece) for piece in [*pieces, b""]), asked


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def cut(data: st.DataObject, stream: bytes) -> list[bytes]:
    """The stream in pieces, none of them empty."""
    places = data.draw(st.lists(st.integers(1, max(1, len(stream) - 1)), unique=True).map(sorted))
    edges = [0, *(place for place in places if place < len(stream)), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


# --- the event -----------------------------------------------------------------------------------

REWRITTEN = {
    "plain": (b"event: endpoint\ndata: /m?a=1\n\n", b"event: endpoint\ndata: /new\n\n", "/m?a=1"),
    "CRLF": (
        b"event: endpoint\r\ndata: /m\r\n\r\n",
        b"event: endpoint\r\ndata: /new\r\n\r\n",
        "/m",
    ),
    "CR": (b"event: endpoint\rdata: /m\r\r", b"event: endpoint\rdata: /new\r\r", "/m"),
    "mixed": (b"event: endpoint\rdata: /m\n\r\n", b"event: endpoint\rdata: /new\n\r\n", "/m"),
    "without spaces": (b"event:endpoint\ndata:/m\n\n", b"event:endpoint\ndata:/new\n\n", "/m"),
    "two spaces": (b"event: endpoint\ndata:  /m\n\n", b"event: endpoint\ndata: /new\n\n", " /m"),
    "data first": (b"data: /m\nevent: endpoint\n\n", b"data: /new\nevent: endpoint\n\n", "/m"),
    "id and retry": (
        b"id: 1\nevent: endpoint\nretry: 5\ndata: /m\nx\n\n",
        b"id: 1\nevent: endpoint\nretry: 5\ndata: /new\nx\n\n",
        "/m",
    ),
    "a comment inside": (
        b"event: endpoint\n: data: /no\ndata: /m\n\n",
        b"event: endpoint\n: data: /no\ndata: /new\n\n",
        "/m",
    ),
    "several data lines": (
        b"event: endpoint\ndata: /m?a\nid: 1\ndata: =b\n\n",
        b"event: endpoint\ndata: /new\nid: 1\n:\n\n",
        "/m?a\n=b",
    ),
    "the last name counts": (
        b"event: message\nevent: endpoint\ndata: /m\n\n",
        b"event: message\nevent: endpoint\ndata: /new\n\n",
        "/m",
    ),
    "no data": (b"event: endpoint\ndata\n\n", b"event: endpoint\ndata:/new\n\n", ""),
    "a field without a name": (
        b"event: endpoint\n: c\ndatax: 1\ndata: /m\n\n",
        b"event: endpoint\n: c\ndatax: 1\ndata: /new\n\n",
        "/m",
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.parametrize("cutting", [lambda stream: [stream], one_by_one], ids=["whole", "bytes"])
@pytest.mark.parametrize(
    "head",
    [
        b"",
        BOM,
        b"\n\r\n",
        b": hi\n\n",
        BOM + b":\r:\r\r",
        b"retry: 9\n\n",
        b"id: 7\r\n\r\nevent: x\r\r",
    ],
)
def test_the_endpoint_is_rewritten_and_nothing_else(
    name: str, cutting: object, head: bytes
) -> None:
    assert callable(cutting)
    before, after, uri = REWRITTEN[name]
    tail = b"event: endpoint\ndata: /other\n\ndata: \xff\r\r\n"
    assert passed(cutting(head + before + tail)) == (head + after + tail, [uri])


UNTOUCHED = {
    "nothing": b"",
    "another event": b"event: message\ndata: {}\n\nevent: endpoint\ndata: /m\n\n",
    "an event without a name": b"data: {}\n\nevent: endpoint\ndata: /m\n\n",
    "a priming event": b"id: 1\ndata: \n\nevent: endpoint\ndata: /m\n\n",
    "comments only": b": a\n\n: b\r\n\r\n:\n",
    "a name that begins so": b"event: endpoints\ndata: /m\n\n",
    "a name with a space": b"event:  endpoint\ndata: /m\n\n",
    "a name in capitals": b"Event: endpoint\ndata: /m\n\n",
    "a name that is taken back": b"event: endpoint\nevent\ndata: /m\n\n",
    "no blank line": b"event: endpoint\ndata: /m\n",
    "a BOM that comes late": b"\n" + BOM + b"event: endpoint\ndata: /m\n\n",
    "half a BOM": BOM[:2] + b"event: endpoint\ndata: /m\n\n",
    "two BOMs": BOM * 2 + b"event: endpoint\ndata: /m\n\n",
    "no event stream": b"\x00\xff\r{",
}


@pytest.mark.parametrize("name", UNTOUCHED)
@pytest.mark.parametrize("cutting", [lambda stream: [stream], one_by_one], ids=["whole", "bytes"])
def test_everything_else_passes_as_it_is(name: str, cutting: Cut) -> None:
    assert passed(cutting(UNTOUCHED[name])) == (UNTOUCHED[name], [])


@pytest.mark.parametrize("uri", [b"/m\xff\xfe", b"http://elsewhere/\xc3\x28", "/größe".encode()])
def test_a_uri_that_is_left_alone_keeps_its_bytes(uri: bytes) -> None:
    rewriter = EndpointRewriter(lambda uri: uri)
    stream = b"event: endpoint\ndata: " + uri[:2] + b"\ndata:" + uri[2:] + b"\n\n"
    assert rewriter.feed(stream) + rewriter.feed(b"") == stream


def test_bytes_that_are_no_utf_8_survive_a_rewriting() -> None:
    rewriter = EndpointRewriter(lambda uri: f"/mount{uri}?x")
    event = b"event: endpoint\ndata: /\xff\xc3\xbc\n\n"
    assert rewriter.feed(event) == b"event: endpoint\ndata: /mount/\xff\xc3\xbc?x\n\n"


# --- when it passes ------------------------------------------------------------------------------


def test_what_cannot_be_the_event_passes_at_once() -> None:
    rewriter = EndpointRewriter(lambda uri: "/new")
    for comment in (BOM + b": a\n", b":\r\n", b"\n", b": b\n\n", b"retry: 1\n\n"):
        assert rewriter.feed(comment) == comment
    assert rewriter.feed(b"event: endpoint\ndata: /m\n") == b""
    assert rewriter.feed(b"\r") == b"event: endpoint\ndata: /new\n\r"
    assert rewriter.feed(b"\ndata: 1") == b"\ndata: 1"


def test_a_first_event_of_another_kind_frees_the_stream() -> None:
    rewriter = EndpointRewriter(lambda uri: "/new")
    assert rewriter.feed(b"data: 1\n") == b""
    assert rewriter.feed(b"\n") == b"data: 1\n\n"
    assert rewriter.feed(b"event: endpoint") == b"event: endpoint"


def test_what_was_kept_back_passes_at_the_end() -> None:
    rewriter = EndpointRewriter(lambda uri: "/new")
    assert rewriter.feed(b"event: endpoint\ndata: /m") == b""
    assert rewriter.feed(b"") == b"event: endpoint\ndata: /m"
    assert rewriter.feed(b"") == b""


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, 10**6])
@pytest.mark.parametrize("comment", [b": c\n", b":\r\n\r\n", b"\r", b": " + b"x" * 60_000 + b"\n"])
def test_an_event_after_any_number_of_comments_is_found(comment: bytes, size: int) -> None:
    head = comment * (MAX_EVENT * 3 // len(comment))
    event = b"event: endpoint\ndata: /m\n\n"
    stream = head + event
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    if size == 1:
        pieces = [head, *one_by_one(event)]
    assert passed(pieces) == (head + event.replace(b"/m", b"/new"), ["/m"])


@pytest.mark.parametrize("size", [1, 5000, 10**6])
@pytest.mark.parametrize("too_much", [0, 1, 2, 70_000])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("head", [b"", BOM, b": c\n\n"])
def test_an_event_over_the_limit_passes_as_it_is(
    size: int, too_much: int, end: bytes, head: bytes
) -> None:
    start = b"event: endpoint" + end + b"data: /"
    event = start + b"m" * (MAX_EVENT - len(start) + too_much) + end + end
    stream = head + event
    edge = max(0, len(stream) - 10)
    pieces = [stream[at : at + max(size, 999)] for at in range(0, edge, max(size, 999))]
    pieces[-1] = pieces[-1][: edge - sum(map(len, pieces[:-1]))]
    pieces += one_by_one(stream[edge:]) if size == 1 else [stream[edge:]]
    found, asked = passed(pieces)
    if too_much:
        assert (found == stream, asked) == (True, [])
    else:
        assert (found, len(asked)) == (head + start[:-1] + b"/new" + end + end, 1)


@pytest.mark.parametrize("first", [b":" + b"c" * MAX_EVENT, b"x" * (MAX_EVENT + 1)])
def test_a_line_over_the_limit_frees_the_stream(first: bytes) -> None:
    stream = first + b"\nevent: endpoint\ndata: /m\n\n"
    for pieces in ([stream], [first, stream[len(first) :]]):
        found, asked = passed(pieces)
        assert (found == stream, asked) == (True, [])


# --- any stream, any pieces ----------------------------------------------------------------------

_texts = st.text("aAÄ:/?= \x00\x85\u2028", max_size=8).map(str.encode)
_lines = st.one_of(
    st.sampled_from([b"event: endpoint", b"event:endpoint", b"event", b"data", b"retry: 1"]),
    st.builds(lambda text: b"data: " + text, _texts),
    st.builds(lambda text: b":" + text, _texts),
    st.just(b""),
    st.binary(max_size=6),
)
_streams = st.tuples(
    st.sampled_from([b"", BOM]),
    st.lists(st.tuples(_lines, st.sampled_from(ENDS)).map(b"".join), max_size=12).map(b"".join),
).map(b"".join)


def first_event(stream: bytes) -> sse.Event | None:
    """The first event that a client would be given, by the decoder that we have."""
    events = sse.Decoder().feed(stream)
    return next((event for event in events if event.data is not None), None)


@given(_streams, st.data())
@example(b"event: endpoint\rdata: /m\r\r\nx", None)
@example(b":\r\revent: endpoint\r\ndata: /m\r\r", None)
def test_a_stream_passes_alike_however_it_is_cut(stream: bytes, data: st.DataObject | None) -> None:
    pieces = cut(data, stream) if data is not None and len(stream) > 1 else one_by_one(stream)
    assert passed(pieces) == passed([stream]) == passed(one_by_one(stream))


@given(_streams)
@example(b"event: endpoint\ndata: \rdata: \n\n")
def test_a_client_sees_the_new_uri_and_otherwise_the_same_events(stream: bytes) -> None:
    first = first_event(stream)
    found, asked = passed([stream])
    before, after = sse.Decoder().feed(stream), sse.Decoder().feed(found)
    if first is None or first.event != b"endpoint":
        assert (found, asked) == (stream, [])
        return
    assert first.data is not None
    assert asked == [first.data.decode("utf-8", "surrogateescape")]
    at = before.index(first)
    new = first_event(found)
    assert new is not None
    assert (new.event, new.data, new.id) == (b"endpoint", b"/new", first.id)
    assert after[:at] + after[at + 1 :] == before[:at] + before[at + 1 :]


@given(_streams)
def test_a_stream_is_not_touched_where_the_uri_stays(stream: bytes) -> None:
    rewriter = EndpointRewriter(lambda uri: uri)
    found = [rewriter.feed(piece) for piece in one_by_one(stream)]
    assert b"".join(found) + rewriter.feed(b"") == stream


# --- the session in a query ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "named", "decoded"),
    [
        ("", None, None),
        ("a=1", None, None),
        ("session_id=x", ("session_id", "x"), "x"),
        ("a=1&sessionId=x&b", ("sessionId", "x"), "x"),
        ("sessionId=y&session_id=x", ("session_id", "x"), "x"),
        (f"{OUR_PARAMETER}=mcp-1", (OUR_PARAMETER, "mcp-1"), "mcp-1"),
        (f"{OUR_PARAMETER}=mcp-1&sessionId=x", ("sessionId", "x"), "x"),
        ("session_id", ("session_id", ""), ""),
        ("session_id=", ("session_id", ""), ""),
        ("session%5Fid=x", ("session_id", "x"), "x"),
        ("session_id=a%2Fb%20c+d", ("session_id", "a%2Fb%20c+d"), "a/b c d"),
        ("session_id=a==", ("session_id", "a=="), "a=="),
        ("session_id=ü", ("session_id", "%C3%BC"), "ü"),
        ("session_id=\udcff", ("session_id", "%FF"), "\ufffd"),
        ("Session_Id=x&SESSIONID=y&session-id=z", None, None),
    ],
)
def test_the_session_that_a_query_names(
    query: str, named: tuple[str, str] | None, decoded: str | None
) -> None:
    found = named_session(query)
    assert found == named
    assert (found.id if found else None) == decoded


@pytest.mark.parametrize(
    ("query", "value", "expected"),
    [
        ("", "n", "p=n"),
        ("a=1", "n", "a=1&p=n"),
        ("a=1&&b=%2f&", "n", "a=1&&b=%2f&&p=n"),
        ("p=o", "n", "p=n"),
        ("a&p=o&b=+%20", "n", "a&p=n&b=+%20"),
        ("%70=o", "n", "p=n"),
        ("p=o", "%FF", "p=%FF"),
        ("p=o", "", "p="),
        ("p=o", None, ""),
        ("a=1&p=o&&b", None, "a=1&&b"),
        ("a=1", None, "a=1"),
        ("", None, ""),
    ],
)
def test_a_query_with_another_session(query: str, value: str | None, expected: str) -> None:
    assert with_session(query, "p", value) == expected


_queries = st.text(string.ascii_letters + "&=%+;/?2f", max_size=20)


@given(_queries)
def test_a_parameter_that_is_added_and_removed_leaves_no_trace(query: str) -> None:
    added = with_session(query, OUR_PARAMETER, "x")
    assert named_session(added) == Named(OUR_PARAMETER, "x")
    assert with_session(added, OUR_PARAMETER, None) == query


@given(_queries, st.text(max_size=8))
def test_a_session_that_is_replaced_comes_back_as_it_was(query: str, text: str) -> None:
    asked = f"{query}&session_id={quote(text, safe='/+')}&{query}"
    named = named_session(asked)
    assert named is not None
    given_away = with_session(asked, named.parameter, "alias")
    assert named_session(given_away) == Named("session_id", "alias")
    assert with_session(given_away, named.parameter, named.value) == asked


# --- where a URI leads ---------------------------------------------------------------------------

BASE = "http://backend:8000/api/sse?t=1"
HOSTS = ["10.0.0.1:8000", "Proxy.example"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/messages/?session_id=1", ("/messages/", "session_id=1")),
        ("messages?x", ("/api/messages", "x")),
        ("./messages", ("/api/messages", "")),
        ("../messages", ("/messages", "")),
        ("?session_id=1", ("/api/sse", "session_id=1")),
        ("", ("/api/sse", "t=1")),
        (" \t/m \n", ("/m", "")),
        ("/a\nb", ("/ab", "")),
        ("/m#fragment", ("/m", "")),
        ("/m;p?a=b;c", ("/m;p", "a=b;c")),
        ("/ä%2F%zz'\"<>", ("/ä%2F%zz'\"<>", "")),
        ("http://backend:8000/m", ("/m", "")),
        ("HTTP://BACKEND:8000/m", ("/m", "")),
        ("//backend:8000/m", ("/m", "")),
        ("http://backend:8000", ("/", "")),
        ("http://backend:8000?a", ("/", "a")),
        ("http://user:pass@backend:8000/m", ("/m", "")),
        ("http://10.0.0.1:8000/m", ("/m", "")),
        ("http://proxy.example/m", ("/m", "")),
        ("http://proxy.example:80/m", ("/m", "")),
        ("https://proxy.example/m", ("/m", "")),
        ("https://proxy.example:443/m", ("/m", "")),
        ("http://backend:8000//m", ("//m", "")),
        ("http://backend/m", None),
        ("http://backend:8001/m", None),
        ("http://proxy.example:8000/m", None),
        ("http://elsewhere:8000/m", None),
        ("http://backend:8000@elsewhere/m", None),
        ("//elsewhere/m", None),
        ("ftp://backend:8000/m", None),
        ("javascript:alert(1)", None),
        ("http://[/m", None),
        ("http://backend:x/m", None),
    ],
)
def test_where_a_uri_leads(uri: str, expected: tuple[str, str] | None) -> None:
    assert local_uri(BASE, uri, HOSTS) == expected


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LocalHost"])
@pytest.mark.parametrize("base", ["localhost", "127.0.0.1", "[::1]"])
def test_the_loopback_has_three_names(base: str, name: str) -> None:
    assert local_uri(f"http://{base}:1/sse", f"http://{name}:1/m", ()) == ("/m", "")
    assert local_uri(f"http://{base}:1/sse", f"http://{name}:2/m", ()) is None
    assert local_uri(f"http://{base}/sse", f"http://{name}:80/m", ()) == ("/m", "")
    assert local_uri("http://backend:1/sse", f"http://{name}:1/m", ()) is None


def test_a_base_without_a_host_leads_nowhere() -> None:
    assert local_uri("http://[/sse", "http://h/m", ()) is None


@given(st.text(), st.lists(st.text(max_size=8), max_size=3))
def test_no_uri_is_too_odd(uri: str, hosts: list[str]) -> None:
    found = local_uri(BASE, uri, hosts)
    assert found is None or found[0].startswith("/")
